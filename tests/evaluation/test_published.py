"""Published numbers of base models: whose they are, which of them can be compared, and when a base is far below."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scipy import stats

from spd_lens.evaluation import (
    LOSS_TASKS,
    Baseline,
    Format,
    Measured,
    Subject,
    known_as,
    models_published,
    own_names,
    published,
    warning,
)
from spd_lens.stats import Estimate
from spd_lens.tasks import PRESETS
from tests.helpers import publish

QWEN = "Qwen2.5-0.5B-Instruct"
CHAT = Format(0, "chat", "the task's own scoring")
REPORT = Baseline(QWEN, "gsm8k", 49.6, Format(4, "chat"), "a report")


def accuracy(value: float, low: float, high: float, form: Format = CHAT) -> Measured:
    return Measured(Estimate(value, low, high, 100, "wilson"), form)


def entries() -> list[dict]:
    return yaml.safe_load(resources.files("spd_lens.evaluation").joinpath("published.yaml").read_text("utf-8"))


# the table


def test_every_entry_says_where_it_stands_and_nothing_is_said_twice() -> None:
    known = {"source", "shots", "prompt", "scoring", "checked", "also", "results"}
    seen = set()
    for entry in entries():
        assert set(entry) <= known and entry["source"]
        assert entry.get("prompt") in (None, "chat", "raw", "verbatim", "reference")
        assert isinstance(entry.get("checked", True), bool)
        for model, values in entry["results"].items():
            for task, value in values.items():
                key = (model, task, entry["source"], entry.get("shots"), entry.get("scoring"))
                assert key not in seen
                seen.add(key)
                assert task in {*PRESETS["paper"], "humaneval"}
                assert 0 < value < (3 if task in LOSS_TASKS else 100)
    assert len(seen) > 80


def test_numbers_of_a_model_in_all_formats() -> None:
    found = published("Qwen/Qwen2.5-0.5B-Instruct", "gsm8k")
    assert {(row.value, row.format.shots) for row in found} == {(11.0, 0), (49.6, None), (26.8, 5), (48.1, 0)}
    assert all(row.model == QWEN and row.task == "gsm8k" and row.source for row in found)
    assert not published("Qwen/Qwen2.5-0.5B-Instruct", "synthetic-math")
    assert not published("Qwen/Qwen2.5-0.5B-Instruct", "data/gsm8k.jsonl")  # a file of one's own
    assert not published("someone/else", "gsm8k")


# whose they are


@pytest.mark.parametrize(
    "name",
    [
        QWEN, "Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-instruct", "/data/models/Qwen2.5-0.5B-Instruct/",
        "unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4", "C:\\Qwen2.5-0.5B-Instruct",
        "models/qwen2.5-0.5b-instruct-q4_k_m.gguf", "Qwen2.5 0.5B Instruct", "x/Qwen2.5-0.5B-Instruct-GGUF",
        "/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/7ae557604adf67be50417f59c2c2f167def9a775",
    ],
)  # fmt: skip
def test_a_model_is_known_by_the_last_part_of_its_name(name: str) -> None:
    assert known_as(name) == QWEN


@pytest.mark.parametrize(
    "name",
    ["", "/", "Qwen2.5-0.5B-Instruct-spd", "my-Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct/adapter", "Qwen"],
)
def test_another_name_is_another_model(name: str) -> None:
    assert known_as(name) is None


def test_instruct_and_base_are_two_models_and_other_names_are_one() -> None:
    assert known_as("Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B"
    assert known_as("Qwen/Qwen3-4B-Instruct-2507") == "Qwen3-4B-Instruct"
    assert known_as("meta-llama/Meta-Llama-3.1-8B-Instruct") == "Llama-3.1-8B-Instruct"
    assert known_as(None, "unknown", "Qwen/Qwen2.5-7B-Instruct") == "Qwen2.5-7B-Instruct"
    assert all(known_as(name) == name for name in models_published())


def test_what_a_local_model_says_of_itself(tmp_path: Path) -> None:
    gguf = SimpleNamespace(_model_name_or_path="Qwen2.5 Coder 0.5B Instruct AWQ")
    assert own_names("model.gguf", gguf) == ["Qwen2.5 Coder 0.5B Instruct AWQ"]
    assert known_as(*own_names("model.gguf", gguf)) == "Qwen2.5-Coder-0.5B-Instruct"
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}))
    assert own_names(str(tmp_path), SimpleNamespace()) == ["Qwen/Qwen2.5-0.5B-Instruct"]
    for silent in ("{", "[]", "{}", '{"_name_or_path": 3}', '{"_name_or_path": ""}'):
        (tmp_path / "config.json").write_text(silent)
        assert own_names(str(tmp_path), SimpleNamespace(_model_name_or_path=None)) == []
    assert own_names("Qwen/Qwen2.5-0.5B-Instruct", SimpleNamespace()) == []


def test_the_setting_comes_before_the_name_and_the_name_before_the_files() -> None:
    assert Subject.of("some/dir", QWEN, "Qwen2.5-7B-Instruct") == Subject(QWEN)
    assert Subject.of(f"Qwen/{QWEN}", None, "Qwen2.5-7B-Instruct") == Subject(QWEN)
    assert Subject.of("some/dir", None, QWEN) == Subject(QWEN, by_its_files=True)
    assert Subject.of("some/dir", "of nobody", QWEN) is None
    assert Subject.of("some/dir") is None


# formats


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        (Format(), "shots and prompt not stated"),
        (Format(scoring="EvalPlus"), "shots and prompt not stated, EvalPlus"),
        (Format(5, None, "lighteval"), "5-shot, prompt not stated, lighteval"),
        (Format(None, "chat"), "shots not stated, chat prompt"),
        (Format(0, "verbatim", "last number"), "zero-shot, verbatim prompt, last number"),
        (Format(0, "reference", "reference"), "zero-shot, the reference code's prompt, the reference code's scoring"),
    ],
)
def test_a_format_in_words(form: Format, shown: str) -> None:
    assert str(form) == shown


def test_the_format_of_an_evaluation_here() -> None:
    options = {"prompt_template": "reference", "scoring": "reference"}
    assert Format.here("verbatim", options) == Format(0, "reference", "reference")
    assert Format.here("chat", options) == Format(
        0, "chat", "reference"
    )  # the text inside a template is another prompt
    assert Format.here("verbatim", {"prompt_template": "instruct"}).prompt == "verbatim"
    assert Format.here("raw", {}) == Format(0, "raw", "the task's own scoring")


def test_only_the_same_prompt_without_examples_is_comparable() -> None:
    assert CHAT.comparable(Format(0, "chat", "lm-eval")) and CHAT.comparable(Format(0, "chat"))
    for other in (
        Format(4, "chat"),
        Format(None, "chat"),
        Format(0, None),
        Format(0, "raw"),
        Format(0, "chat", "reference"),
    ):
        assert not CHAT.comparable(other)
    assert not Format(0, None).comparable(Format(0, None))
    assert not Format(5, "chat").comparable(Format(5, "chat"))
    paper = published(QWEN, "gsm8k")[0].format
    assert Format.here("verbatim", {"prompt_template": "reference", "scoring": "reference"}).comparable(paper)
    assert not Format.here("verbatim", {"prompt_template": "reference"}).comparable(paper)


# the gate


def test_a_base_far_below_is_named_with_both_formats() -> None:
    assert warning([REPORT], accuracy(0.11, 0.06, 0.19)) == (
        "The base scores 11.0 [6.0, 19.0] % here (zero-shot, chat prompt, the task's own scoring); 49.6 % is published "
        "(4-shot, chat prompt). Much of what a method gains may be format or stopping."
    )


@pytest.mark.parametrize("best", [1.4, 12.0, 20.0, 39.9, 40.1, 49.6, 91.6, 99.0])
def test_far_below_is_ten_points_and_a_quarter(best: float) -> None:
    row = Baseline(QWEN, "gsm8k", best, Format(), "x")
    highest = min(best - 10, 0.75 * best)  # an independent form of the rule, in percent
    for points in (-0.01, 0.01):
        high = (highest + points) / 100
        if high > 0:
            assert (warning([row], accuracy(high / 2, 0.0, high)) is None) is (points > 0)
    if highest < 0:
        assert warning([row], accuracy(0.0, 0.0, 0.0)) is None


def test_the_highest_published_number_counts_in_whatever_format() -> None:
    low = Baseline(QWEN, "gsm8k", 11.0, CHAT, "in the same format")
    unchecked = Baseline(QWEN, "gsm8k", 60.0, Format(), "x", checked=False)
    found = warning([low, unchecked, REPORT], accuracy(0.11, 0.06, 0.19))
    assert "60 % is published (shots and prompt not stated; not checked against the source)" in (found or "")
    assert warning([low], accuracy(0.02, 0.0, 0.04)) is None


def test_no_warning_without_an_interval_or_on_a_loss() -> None:
    assert warning([REPORT], accuracy(0.0, -math.inf, math.inf)) is None
    assert warning([], accuracy(0.0, 0.0, 0.0)) is None
    loss = Baseline(QWEN, "codealpaca", 30.0, Format(0, "reference", "reference"), "x")
    assert warning([loss], Measured(Estimate(0.001, 0.0, 0.002, 100, ""), CHAT)) is None


def test_the_papers_own_base_rows_are_far_below_the_reports() -> None:
    """11, 49 and 39 of 100, with scipy's Wilson interval: the paper's table 1 does not pass the gate."""
    for model, right in ((QWEN, 11), ("Qwen2.5-7B-Instruct", 49), ("Llama-3.1-8B-Instruct", 39)):
        interval = stats.binomtest(right, 100).proportion_ci(method="wilson")
        measured = accuracy(right / 100, interval.low, interval.high)
        assert "Much of what a method gains" in (warning(published(model, "gsm8k"), measured) or "")


# in reports


def rows(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def test_both_formats_stand_beside_each_other() -> None:
    lines = Subject(QWEN).beside("gsm8k", accuracy(0.11, 0.06, 0.19))
    assert lines[0].endswith("none of it in the format used here:")
    assert rows(lines)[0] == ["**11.0 [6.0, 19.0]**", "zero-shot, chat prompt, the task's own scoring", "**here**"]
    assert {row[0] for row in rows(lines)[1:]} == {"11", "49.6", "26.8", "48.1"}
    assert all(row[2] for row in rows(lines))
    assert lines[-1].startswith("**The base scores 11.0")


def test_the_comparable_number_comes_first() -> None:
    here = Format.here("verbatim", {"prompt_template": "reference", "scoring": "reference"})
    lines = Subject("Qwen2.5-0.5B-Instruct").beside("mbpp", accuracy(0.17, 0.13, 0.22, here))
    assert "none of it" not in lines[0]
    marked = [row[0] for row in rows(lines) if "the same format" in row[1]]
    assert marked == ["17", "11.7"] == [row[0] for row in rows(lines)[1:3]]


def test_the_comparable_number_comes_first_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = [(40.0, Format(5, "chat")), (30.0, Format(0, "chat", "lm-eval")), (20.0, Format(0, "raw"))]
    publish(monkeypatch, {("Own", "gsm8k"): made_up})
    lines = Subject("Own").beside("gsm8k", accuracy(0.3, 0.2, 0.35))
    assert [row[0] for row in rows(lines)] == ["**30.0 [20.0, 35.0]**", "30", "40", "20"]
    assert ["the same format" in row[1] for row in rows(lines)] == [False, True, False, False]


def test_a_loss_is_in_nats_and_warns_of_nothing() -> None:
    lines = Subject(QWEN).beside("codealpaca", Measured(Estimate(0.712, 0.65, 0.77, 100, ""), CHAT))
    assert "loss of the reference" in lines[0]
    assert rows(lines)[0][0] == "**0.71 [0.65, 0.77]**"
    assert rows(lines)[1][0] == "0.683"
    assert not any(line.startswith("**The base") for line in lines)


def test_nothing_is_printed_where_nothing_is_known() -> None:
    assert Subject(QWEN).beside("synthetic-math", accuracy(0.1, 0.0, 0.2)) == []


def test_what_only_the_files_say_is_called_so() -> None:
    assert "what its own files say" in Subject(QWEN, by_its_files=True).caveat
    assert Subject(QWEN).caveat == ""


def test_what_was_not_checked_is_called_so() -> None:
    lines = Subject("Qwen2.5-Coder-0.5B-Instruct").beside("mbpp", accuracy(0.5, 0.4, 0.6))
    assert rows(lines)[1][2].endswith("; not checked against the source")
