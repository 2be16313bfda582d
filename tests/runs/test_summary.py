"""`summary.md`: its numbers are those of the files, it claims no more than they carry, and no text can break it."""

import dataclasses
import json
import math
import re
import shutil
from statistics import fmean

import pytest
from markdown_it import MarkdownIt
from scipy import stats

import spd_lens as spd
from spd_lens.evaluation import Format
from spd_lens.evaluation.outcomes import OUTCOMES
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.evaluation.teacher_forced import ForcedItem
from spd_lens.files import read_json, write_text
from spd_lens.files.contents import write_json
from spd_lens.runs import Run
from spd_lens.runs import summary as report
from spd_lens.runs.summary import changed, effects_section, quoted, write_summary
from tests.helpers import publish

TASK = "synthetic-math"


def json_of(run, name):
    return read_json(run.path / name)


def table(text, heading):
    """Rows of the first table below a heading: `{first cell: {column: cell}}`."""
    lines = text.partition(heading)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[start:]]
    size = next(i for i, line in enumerate([*lines[start:], ""]) if not line.startswith("|"))
    head, _, *body = rows[:size]
    assert all(len(row) == len(head) for row in body)
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def estimate(cell):
    """Value, lower and upper end of `0.42 [0.33, 0.51] (n=100)`, and half a unit of the last decimal."""
    value, low, high, n = re.match(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\] \(n=(\d+)\)", cell).groups()
    return (float(value), float(low), float(high)), int(n), 0.5001 * 10 ** -len(value.partition(".")[2])


def assert_estimate(cell, value, low=None, high=None, n=None):
    found, count, half_unit = estimate(cell)
    for mine, theirs in zip(found, (value, low, high), strict=True):
        assert theirs is None or mine == pytest.approx(theirs, abs=half_unit), cell
    assert n is None or count == n


def wilson(right, n, z=1.959963984540054):
    centre, half = right / n + z * z / (2 * n), z * math.sqrt(right / n * (1 - right / n) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_scores_are_those_of_the_files(finished_run):
    rows = table(finished_run.summary, f"## `{TASK}`: 12 test items")
    assert list(rows) == ["base", "projected", "spd"]
    for policy, row in rows.items():
        items = json_of(finished_run, f"eval/{TASK}/{policy}.json")["items"]
        right = sum(item["score"] for item in items)
        assert_estimate(row["accuracy"], right / 12, *wilson(right, 12), 12)
        cut = sum(item["finish_reason"] == "length" for item in items)
        assert_estimate(row["cut off"], cut / 12, *wilson(cut, 12), 12)
        assert_estimate(row["mean length (tokens)"], fmean(item["n_tokens"] for item in items), n=12)


def test_outcomes_are_those_of_the_files(finished_run):
    rows = table(finished_run.summary, f"### Teacher-forced on gold solutions of `{TASK}`")
    effects = json_of(finished_run, f"effects/{TASK}.json")
    other = json_of(finished_run, "side_effects/neutral.json")
    places = {heading: (effects, outcome) for outcome, heading in OUTCOMES.items()}
    places |= {"loss on other texts": (other, "aligned_loss"), "KL on other texts": (other, "kl")}
    assert list(rows) == list(places)
    for heading, (found, outcome) in places.items():
        values = {name: [item[outcome] for item in items if outcome in item] for name, items in found.items()}
        values["2 random subspaces"] = [
            fmean(pair) for pair in zip(values["random-0"], values["random-1"], strict=True)
        ]
        cells, n = rows[heading], len(values["base"])
        policies = ("projected", "spd", "2 random subspaces")
        assert list(cells) == ["outcome", "base", *(f"{name} − base" for name in policies), "what it says"]
        assert_estimate(cells["base"], fmean(values["base"]), n=n)
        for name in policies:
            differences = [b - a for a, b in zip(values["base"], values[name], strict=True)]
            assert_estimate(cells[f"{name} − base"], fmean(differences), n=n)
            if heading == "aligned loss":
                boot = stats.bootstrap((differences,), fmean, vectorized=False, method="BCa", n_resamples=999, rng=1)
                (_, *ends), _, _ = estimate(cells[f"{name} − base"])
                width = boot.confidence_interval.high - boot.confidence_interval.low
                assert ends == pytest.approx(list(boot.confidence_interval), abs=0.2 * width)  # resampling has noise
        assert cells["what it says"].endswith(".")
    for outcome in ("aligned_loss", "results_loss", "answer_only_loss"):
        values = {name: fmean(item[outcome] for item in items if outcome in item) for name, items in effects.items()}
        heading = OUTCOMES[outcome].capitalize()
        sentence = re.search(rf"{heading}, projected minus random: (.*?\(n=\d+\))", finished_run.summary)[1]
        assert_estimate(sentence, values["projected"] - (values["random-0"] + values["random-1"]) / 2)
        each = sorted(values[f"random-{i}"] for i in range(2))
        assert f"ranged from {each[0]:.3f} to {each[1]:.3f}" in finished_run.summary
        sentence = re.search(rf"{heading} after fine-tuning, minus before: (.*?\(n=\d+\))", finished_run.summary)[1]
        assert_estimate(sentence, values["spd"] - values["base"])


def test_an_outcome_that_is_another_ones_number_is_not_shown_twice(finished_run):
    effects = finished_run.effects(TASK)
    same = {
        name: [dataclasses.replace(item, answer_only_loss=item.aligned_loss) for item in items]
        for name, items in effects.items()
    }
    assert "answer-only loss" in effects_section(effects, TASK)
    assert "nswer-only loss" not in effects_section(same, TASK)


def test_proofs_are_those_of_the_files(finished_run):
    text, firings = finished_run.summary, finished_run.notes["hooks"]["firings"]
    assert ", ".join(f"{site}: {n}" for site, n in firings.items()) in text
    records = {name: [json.loads(line) for line in (finished_run.path / f"{name}.jsonl").read_text().splitlines()]
               for name in ("corpus", "unprojected")}  # fmt: skip
    plain = {record["id"]: record["completion_ids"] for record in records["unprojected"]}
    moved = [record["completion_ids"] != plain[record["id"]] for record in records["corpus"] if record["id"] in plain]
    assert len(moved) == 6
    assert_estimate(re.search(r"projection changed.*?: (.*)\.", text)[1], sum(moved) / 6, *wilson(sum(moved), 6))
    ended = sum(record["finish_reason"] == "eos" for record in records["corpus"])
    assert_estimate(re.search(r"ended by itself: (.*)\.", text)[1], ended / 12, *wilson(ended, 12))


@pytest.mark.parametrize(
    ("dtype", "n_compared", "said"), [("bfloat16", 6, True), ("bfloat16", 12, False), ("float32", 6, False)]
)
def test_rounding_is_owned_up_to(run, dtype, n_compared, said):
    """Where batches differ, bfloat16 changes tokens by itself."""
    run.note(resolved={**run.notes["resolved"], "dtype": dtype})
    if n_compared == 12:
        for name in ("unprojected.jsonl", "unprojected.settings.json"):
            write_text(run.path / name, (run.path / name.replace("unprojected", "corpus")).read_text())
    assert ("differ by their batch alone" in write_summary(run)) is said


def test_the_heading_says_what_was_done(finished_run):
    calibration = spd.tasks.get(TASK).calibration(6, 42)
    head = finished_run.summary.partition("\n## ")[0]
    assert head.startswith(f"# SPD on `{TASK}` with `{finished_run.config.model}`")
    assert f"{len(calibration)} examples" in head
    assert "1.k: 4/4; 1.v: 4/4; 3.k: 4/4; 3.v: 4/4; strength 1" in head
    assert "12 completions of at most 8 tokens (temperature 0.7, top_p 0.95)" in head
    assert "lora, 2 epochs, learning rate 0.01, seed 42" in head


def test_seconds(finished_run):
    seconds = finished_run.notes["seconds"]
    row = next(iter(table(finished_run.summary, "## Time").values()))
    assert list(row) == ["extract", "generate", "compare", "finetune", "effects", "evaluate", "total"]
    assert row["total"] == f"{sum(seconds.values()):.0f} s"


def test_what_was_foreseen_stands_beside_what_was_taken(finished_run, tmp_path):
    run = Run(shutil.copytree(finished_run.path, tmp_path / "run"))
    run.note(foreseen={"extract": 30.0, "effects": 71.0})
    rows = table(write_summary(run), "## Time")
    assert rows["taken"] == {"time": "taken", **next(iter(table(finished_run.summary, "## Time").values()))}
    assert (rows["foreseen"]["extract"], rows["foreseen"]["total"]) == ("30 s", "101 s")


# verdicts


def forced(loss, kl=0.1, n=40):
    """Items whose losses spread by 1 around `loss`, in the same way for every policy."""
    return [ForcedItem(str(i), loss + i / n, loss, kl + i / 1000, i % 2) for i in range(n)]


def noisy(items, size=1.0):
    """Up and down in turn: no change on average."""
    return [
        dataclasses.replace(item, aligned_loss=item.aligned_loss + size * (-1) ** i) for i, item in enumerate(items)
    ]


def test_an_effect_is_named_and_noise_is_called_noise():
    base = forced(2.0, 0.0)
    less = [dataclasses.replace(item, aligned_loss=item.aligned_loss - 0.5 - i / 100) for i, item in enumerate(base)]
    random = [forced(2.0 + shift, 0.3) for shift in (0.101, 0.301)]
    effects = {"base": base, "projected": less, "spd": noisy(base), "random-0": random[0], "random-1": random[1]}
    text = effects_section(effects, TASK)
    aligned = re.search(r"- Aligned loss, projected minus random: (.*)", text)[1]
    assert "projected is lower" in aligned
    assert "ranged from 2.588 to 2.788" in aligned
    assert re.search(r"Aligned loss after fine-tuning, minus before: .*; within noise\.", text)
    rows = table(text, "###")
    assert_estimate(rows["2 random subspaces"]["change from base"], 0.201)
    assert_estimate(rows["projected"]["change from base"], -0.5 - fmean(i / 100 for i in range(40)))
    swapped = effects_section({**effects, "projected": noisy(random[0]), "spd": less}, TASK)
    assert "within noise" in re.search(r"- Aligned loss, projected minus random: (.*)", swapped)[1]
    assert re.search(r"Aligned loss after fine-tuning, minus before: .*; lower\.", swapped)


def test_without_controls_nothing_is_compared_with_them():
    text = effects_section({"base": forced(2.0), "projected": forced(1.0), "spd": forced(1.5)}, TASK)
    assert "random" not in text


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    return spd.Run(tmp_path / "run")


def rewrite(run, policy, **change):
    """Let a policy's results be others: `change` maps a field to a function of the item's place and the item."""
    result = run.result(TASK, policy)
    items = [dataclasses.replace(item, **{name: make(i, item) for name, make in change.items()})
             for i, item in enumerate(result.items)]  # fmt: skip
    dataclasses.replace(result, items=items).save(run.path / "eval" / TASK / f"{policy}.json")


@pytest.mark.parametrize(("right", "verdict"), [(12, "spd is higher"), (2, "within noise"), (0, "within noise")])
def test_accuracy_is_compared_by_mcnemar(run, right, verdict):
    rewrite(run, "base", score=lambda i, item: 0.0)
    rewrite(run, "spd", score=lambda i, item: float(i < right))
    line = re.search(r"- Accuracy, spd minus base: (.*)", write_summary(run))[1]
    assert line.endswith(f"(only base 0, only spd {right}); {verdict}.")
    p = 2 * 0.5**right if right else 1.0
    assert f"p = {min(p, 1.0):.2g}" in line


def test_fractional_scores_have_no_mcnemar(run):
    rewrite(run, "base", score=lambda i, item: 0.1 + 0.01 * i)
    rewrite(run, "spd", score=lambda i, item: 0.8 - 0.01 * i)
    line = re.search(r"- Accuracy, spd minus base: (.*)", write_summary(run))[1]
    assert "McNemar" not in line
    assert line.endswith("spd is higher.")


def test_without_effects_there_is_no_section(run):
    (run.path / "effects" / f"{TASK}.json").unlink()
    assert "Teacher-forced on" not in write_summary(run)


def test_answers_by_likelihood_have_a_column_where_there_are_some(run):
    rewrite(run, "base", choice=lambda i, item: "A", choice_score=lambda i, item: float(i < 3))
    rows = table(write_summary(run), f"## `{TASK}`")
    assert_estimate(rows["base"]["accuracy by likelihood"], 3 / 12, *wilson(3, 12), 12)


def test_items_that_cannot_be_judged_have_a_column_where_there_are_some(run):
    heading = "cannot be judged (left out)"
    assert heading not in write_summary(run)
    rewrite(run, "spd", judged=lambda i, item: i > 1, score=lambda i, item: float(i > 1))
    text = write_summary(run)
    rows = table(text, f"## `{TASK}`")
    assert (rows["base"][heading], rows["spd"][heading]) == ("0", "2")
    assert_estimate(rows["spd"]["accuracy"], 1.0, *wilson(10, 10), 10)


# what is published of the base


def named(run, **settings):
    """The run with settings that name its model."""
    config = spd.SPDConfig.make({**run.config.model_dump(), **settings})
    write_text(run.config_path, config.to_yaml())


def test_what_is_published_stands_beside_the_base(run, monkeypatch):
    asked = run.result(TASK, "base").settings["prompt_format"]
    publish(monkeypatch, {("Known", TASK): [(77.0, Format(4, "chat")), (30.0, Format(0, asked))]})
    rewrite(run, "base", score=lambda i, item: float(i < 2))
    rewrite(run, "spd", score=lambda i, item: float(i < 9))
    before = write_summary(run)
    assert "published" not in before  # the model is a directory that says nothing of itself
    named(run, model="someone/known")
    text = write_summary(run)
    low, high = (100 * end for end in wilson(2, 12))
    rows = table(text, f"accuracy (%) on {TASK}, and what is published of Known:")
    assert list(rows) == [f"**16.7 [{low:.1f}, {high:.1f}]**", "30", "77"]
    assert rows["30"]["format"] == f"zero-shot, {asked} prompt (**the same format**)"
    assert rows["77"] == {"base model": "77", "format": "4-shot, chat prompt", "source": "source 0"}
    assert f"**The base scores 16.7 [{low:.1f}, {high:.1f}] % here (zero-shot, {asked} prompt" in text
    section = text[text.index("The base model's accuracy") : text.index("### Teacher-forced")]
    head = {line for line in text.splitlines() if line.startswith("# SPD on")}
    assert set(text.replace(section, "").splitlines()) - head <= set(before.splitlines())  # and nothing else changes


def test_a_name_of_ones_own_for_a_local_model(run, monkeypatch):
    publish(monkeypatch, {("Known", TASK): [(77.0, Format(4, "chat"))]})
    named(run, published_name="known")
    assert "published of Known" in write_summary(run)
    named(run, published_name=None)
    assert "published" not in write_summary(run)
    run.note(published_name="Known")
    assert write_summary(run).count("is what its own files say") == 1
    named(run, policies=["spd"])
    assert "published" not in write_summary(run)


def test_the_model_of_a_later_round_is_not_the_published_one(run, monkeypatch):
    publish(monkeypatch, {("Known", TASK): [(77.0, Format(4, "chat"))]})
    named(run, model="someone/known")
    write_json(run.path.parent / "rounds.json", {})
    for number, shown in ((1, True), (2, False)):
        copy = shutil.copytree(run.path, run.path.parent / f"round-{number}")
        assert ("published of Known" in write_summary(spd.Run(copy))) is shown


# completions


def test_pairs_that_differ_come_first(run):
    rewrite(run, "base", completion=lambda i, item: f"same {i}")
    rewrite(run, "spd", completion=lambda i, item: f"same {i}" if i not in (4, 9) else f"other {i}")
    shown = re.findall(r"\*\*Base \(0\):\*\* `(.*?)`", write_summary(run))
    assert shown == ["same 4", "same 9", "same 0"]


def test_changed_is_by_prompt(finished_run):
    corpus, plain = finished_run.corpus, finished_run.unprojected
    assert changed(corpus, corpus) == [False] * 12
    assert changed(corpus, list(plain)[::-1]) == changed(corpus, plain)
    assert len(changed(corpus, plain)) == 6


def test_the_headings_count_what_is_shown(run):
    lines = (run.path / "unprojected.jsonl").read_text().splitlines(keepends=True)
    (run.path / "unprojected.jsonl").write_text(lines[0])
    text = write_summary(run)
    assert "without and with the projection (1 of 1)" in text
    assert "greedy (3 of 12)" in text
    assert text.count("**Projected:**") == 1


NASTY = (
    "| a | b |\n| --- | --- |\n\n# Heading\r\n<script>alert(1)</script> **bold** `code` ``two`` [link](http://x.y)"
    " ![i](z) <b>x</b> &amp;\u2028- item\x1b[31m red\x00\t\\ $x$ > quote\n```\nfence"
)


def outline(text):
    """What a Markdown reader sees: block and inline elements, with the text of headings."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or []]
    kinds = [token.type for token in tokens] + [
        token.type for token in inline if token.type not in ("text", "code_inline")
    ]
    titles = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    return kinds, titles, [token.content for token in inline if token.type == "code_inline"]


def test_no_text_can_break_the_page(run):
    before = outline(write_summary(run))
    records = [json.loads(line) for line in (run.path / "corpus.jsonl").read_text().splitlines()]
    for record in records:
        del record["sum"]  # the change is meant
    poisoned = [json.dumps({**record, "prompt": NASTY, "completion": NASTY}) + "\n" for record in records]
    (run.path / "corpus.jsonl").write_text("".join(poisoned))
    for policy in ("base", "spd"):
        rewrite(run, policy, completion=lambda i, item: NASTY, prompt=lambda i, item: NASTY)
    text = write_summary(run)
    after = outline(text)
    assert after[:2] == before[:2]  # the same elements, and no other heading, table, link or HTML
    assert not {"html_block", "html_inline", "link_open", "image", "fence"} & set(after[0])
    spans = [span for span in after[2] if "script" in span]
    assert len(spans) == 3 * 2 + 3 * 3
    assert "\x1b" not in text
    assert "\x00" not in text
    assert all("<script>alert(1)</script> **bold** `code` ``two`` [link](http://x.y)" in span for span in spans)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("12 + 30 = 42", "`12 + 30 = 42`"),
        ("a\nb\r\nc", "`a ⏎ b ⏎ c`"),
        ("", "(nothing)"),
        (" \n ", "(nothing)"),
        ("`x`", "`` `x` ``"),
        ("a``b", "```a``b```"),
        ("a  b", "`a  b`"),
        ("\ud800", "`�`"),
    ],
)
def test_quoted(text, shown):
    assert quoted(text) == shown


def test_long_texts_keep_their_ends():
    shown = quoted("#" + "x" * 5000 + "42")  # one word: nothing to break at
    assert len(shown) < 620
    assert shown.startswith("`#xx")
    assert shown.endswith("xx42`")


def test_a_run_without_base_can_be_summed_up(run):
    config = spd.SPDConfig.make({**run.config.model_dump(), "policies": ["spd"]})
    write_text(run.config_path, config.to_yaml())
    text = write_summary(run)
    assert list(table(text, f"## `{TASK}`")) == ["spd"]
    assert "minus base" not in text


def test_one_item(run):
    """No interval, no verdict, no crash."""
    for policy in run.config.policies:
        result = run.result(TASK, policy)
        EvalResult(policy, TASK, result.items[:1], {}).save(run.path / "eval" / TASK / f"{policy}.json")
    effects = json_of(run, f"effects/{TASK}.json")
    write_json(run.path / "effects" / f"{TASK}.json", {name: items[:1] for name, items in effects.items()})
    text = write_summary(run)
    assert "too few items to say" in text
    assert "[no interval]" in text
    assert dataclasses.is_dataclass(ItemResult)


def test_a_change_below_rounding_is_called_so(finished_run):
    effects = finished_run.effects(TASK)
    kl = fmean(item.kl for item in effects["spd"])
    assert "the training changed little" in report.effects_section(effects, TASK, rounding=kl)
    assert "the training changed little" not in report.effects_section(effects, TASK, rounding=kl / 3)
    assert "the training changed little" not in report.effects_section(effects, TASK)
