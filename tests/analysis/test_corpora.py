"""Corpora side by side: the same prompts, paired differences, and pages that show every word as it was written."""

from __future__ import annotations

import html
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from spd_lens import tasks
from spd_lens.analysis.common.style import NULL_COLOR
from spd_lens.analysis.corpora import command as module
from spd_lens.analysis.corpora.command import corpora_differences, corpora_overlaps, corpora_table, say, shares_figure
from spd_lens.analysis.corpora.page import added_words, corpora_page
from spd_lens.analysis.corpora.sources import corpora_sets, pooled, shared_prompts
from spd_lens.generation.corpus import Corpus, Record
from spd_lens.stats.intervals import paired_difference
from tests.helpers import refused

MATH = tasks.get("synthetic-math")


def record(id, text, *, n=5, finish="eos", sample=0, prompt=None):
    return Record(str(id), prompt or f"prompt {id}", text, (1,), tuple(range(10, 10 + n)), finish, sample)


def two(n=12):
    rng = np.random.default_rng(0)
    base = [record(i, f"so {i} it is\n#### {i}", n=int(k)) for i, k in enumerate(rng.integers(20, 40, n))]
    spd = [record(i, f"#### {i}", n=int(k), finish="length") for i, k in enumerate(rng.integers(5, 15, n))]
    return base, spd


def test_only_prompts_that_all_answer_are_compared_in_the_firsts_order():
    base, spd = two(4)
    found = shared_prompts({"base": [base[2], base[0], base[3]], "spd": spd[:3]})
    assert [[r.id for r in own] for own in found.values()] == [["2", "0"], ["2", "0"]]
    with refused("psr", "no prompt in common"):
        shared_prompts({"psr": [record(0, "x", prompt="another text")], "spd": spd})
    with refused("two corpora", "psr"):
        shared_prompts({"psr": base})


def test_differences_are_paired_by_prompt():
    base, spd = two()
    found = corpora_differences({"base": base, "spd": spd}, MATH).set_index("measure")
    lengths = [[r.n_completion_tokens for r in own] for own in (base, spd)]
    wanted = paired_difference(*lengths)
    assert found.loc["length", ["value", "low", "high", "n"]].tolist() == [
        wanted.value, wanted.low, wanted.high, wanted.n,
    ]  # fmt: skip
    assert found.value["length"] == pytest.approx(np.mean(lengths[1]) - np.mean(lengths[0])) and wanted.high < 0
    assert found.value["truncated"] == 1 and found.value["in the asked form"] == 0
    assert set(found.reference) == {"base"}
    # the order of the second corpus changes nothing, other samples are averaged first
    twice = [*spd[::-1], *(record(r.id, r.completion, n=r.n_completion_tokens + 2, sample=1) for r in spd)]
    again = corpora_differences({"base": base, "spd": twice}, MATH).set_index("measure")
    assert again.value["length"] == pytest.approx(found.value["length"] + 1)
    assert again.n["length"] == 12


def test_prompts_without_an_answer_drop_out_of_that_measure_alone():
    base, spd = two()
    spd[0] = record(0, "no number at all")
    found = corpora_differences({"base": base, "spd": spd}, MATH).set_index("measure")
    assert found.n["after the answer"] == 11 and found.n["length"] == 12
    without = corpora_differences({"base": base, "spd": spd})
    assert "after the answer" not in set(without.measure)


def test_a_corpus_without_any_answer_is_in_the_figure_without_that_measure():
    base, _ = two()
    silent = [record(n, "no number at all") for n in range(12)]
    table = corpora_table({"base": base, "silent": silent}, MATH)
    assert "after the answer" not in set(table[table["method"] == "silent"]["measure"])
    drawn = {trace.name: dict(zip(trace.text, trace.x, strict=True)) for trace in shares_figure(table).data}
    assert drawn["silent"]["in the asked form"] == 0 and math.isnan(drawn["silent"]["after the answer"])
    assert 0 <= drawn["base"]["after the answer"] <= 1


def test_overlap_of_words_and_its_null():
    base = [record(0, "a b c d"), record(1, "e f")]
    spd = [record(0, "a b x y"), record(1, "g h")]
    found = corpora_overlaps({"base": base, "spd": spd}, null=base).set_index("method")
    assert found.value["spd"] == pytest.approx((0.5 + 0) / 2)
    assert found.value["base, another seed"] == 1 and found["null"]["base, another seed"]
    assert "by the draw alone" in say(pd.DataFrame({"method": []}), found.reset_index())


def test_seeds_are_pooled_as_samples():
    base, _ = two(3)
    again = [record(r.id, r.completion + "!", sample=s) for r in base for s in range(2)]
    found = pooled([base, again, base])
    assert len({r.key for r in found}) == len(found) == 12
    assert sorted(r.sample for r in found if r.id == "1") == [0, 1, 2, 3]


def test_the_table_has_every_method_and_the_figure_every_number():
    base, spd = two()
    table = corpora_table({"base": base, "spd": spd}, MATH)
    assert list(dict.fromkeys(table.method)) == ["base", "spd"]
    fig = shares_figure(table, controls=["spd"])
    assert [trace.name for trace in fig.data] == ["base", "spd"]
    assert fig.data[1].marker.symbol.endswith("-open") and fig.data[1].marker.color == NULL_COLOR
    for trace in fig.data:
        values = table[table.method == trace.name].set_index("measure").value
        assert list(trace.x) == [values[measure] for measure in trace.text]
        assert np.isfinite([*trace.x, *trace.error_x.array, *trace.error_x.arrayminus]).all()


def test_sentences_claim_what_the_intervals_carry():
    base, spd = two()
    corpora = {"base": base, "spd": spd}
    sentence = say(corpora_differences(corpora, MATH), corpora_overlaps(corpora))
    assert "length -" in sentence and "No control" in sentence and "not corrected" in sentence
    same = {"base": base, "spd": base}
    nothing = say(corpora_differences(same, MATH), corpora_overlaps(same), controls=["spd"])
    assert "nothing beyond noise, 6 of 6" in nothing and "No control" not in nothing


@pytest.mark.parametrize(
    "pair", [("a b c", "a x c d"), ("", "a b"), ("  a\nb", "  a\n\nb c"), ("w " * 500, "v " * 450)]
)
def test_pieces_are_the_text_and_mark_what_is_new(pair):
    before, after = pair
    pieces = list(added_words(before, after))
    assert "".join(text for text, _ in pieces) == after
    kept = "".join(text for text, is_new in pieces if not is_new).split()
    words = iter(before.split())
    assert all(word in words for word in kept)  # a subsequence of the first text
    assert [text.split() for text, is_new in added_words("a b c", "a x c d") if is_new] == [["x"], ["d"]]


EVIL = '<script>alert(1)</script> & "quotes" \u202e#### 3\nthat was <b>3</b>'


def test_the_page_shows_every_text_and_runs_nothing():
    base = [record(i, f"first {i}\n#### {i}") for i in range(3)] + [record(3, EVIL, prompt=EVIL)]
    spd = [record(i, f"second {i}\n#### {i}\nmore talk") for i in range(3)] + [record(3, "#### 3", prompt=EVIL)]
    corpora = {"base": base, "<spd>": spd}
    page = corpora_page("x<y", corpora, MATH, n=4, says="a & b", table=corpora_table(corpora, MATH))
    assert "<script" not in page and "default-src 'none'" in page and "<b>3" not in page and "\u202e" not in page
    pres = [html.unescape(re.sub("<[^>]+>", "", pre)) for pre in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S)]
    assert pres[1] == "first 0\n#### 0" and pres[2] == "second 0\n#### 0\nmore talk"
    assert re.search(r'<ins>second</ins> 0\n#### 0\n?<span class="behind">\s*<ins>more talk</ins></span>', page)
    assert page.count('class="card"') == 4
    assert corpora_page("t", corpora, None, n=2, table=corpora_table(corpora)).count('class="card"') == 2


def test_files_and_runs_are_found_by_the_command(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    module.main([str(run)], n=2, quiet=True)
    out = capsys.readouterr().out
    assert "base" in out and "spd" in out and "not corrected" in " ".join(out.split())
    written = {path.name for path in (run / "analysis").iterdir()}
    assert written == {"corpora.csv", "corpora-differences.csv", "corpora-overlaps.csv", "corpora.json", "corpora.html",
                       "corpora-text.html"}  # fmt: skip
    table = pd.read_csv(run / "analysis" / "corpora.csv")
    assert set(table[table.measure == "prompts"].value) == {6}
    files = [f"a={run / 'corpus.jsonl'}", f"b={run / 'unprojected.jsonl'}"]
    module.main(files, n=1, task="synthetic-math", out=tmp_path / "out", quiet=True)
    differences = pd.read_csv(tmp_path / "out" / "corpora-differences.csv")
    assert set(differences.method) == {"b"} and set(differences.n) <= set(range(7))
    with refused("two of the corpora", "corpus"):
        list(corpora_sets([str(run / "corpus.jsonl"), str(run / "corpus.jsonl")]))
    with refused("not a run directory"):
        list(corpora_sets([str(tmp_path)]))


def test_a_study_gives_one_set_per_source(tmp_path):
    from spd_lens.study.config import StudyConfig

    config = StudyConfig.make({"sources": ["synthetic-math"], "methods": ["psr", "spd", "spd-random"], "seeds": [1, 2]})
    (tmp_path / "study.yaml").write_text(config.to_yaml())
    base, spd = two()
    for method, records in {"spd": spd, "psr": base}.items():
        for seed in (1, 2):
            path = tmp_path / "synthetic-math" / method / str(seed) / "corpus.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(r.to_json() + "\n" for r in Corpus(records)))
    (found,) = corpora_sets([str(tmp_path)])
    assert list(found.corpora) == ["psr", "spd"] and found.null is not None and found.controls == ()
    assert len(found.corpora["psr"]) == 24 and len(found.shown["psr"]) == 12
    (chosen,) = corpora_sets([str(tmp_path)], methods="spd,psr", seed=2)
    assert list(chosen.corpora) == ["spd", "psr"]
    with refused("no seed 7", "1, 2"):
        list(corpora_sets([str(tmp_path)], seed=7))
    with refused("ssd", "psr"):
        list(corpora_sets([str(tmp_path)], methods="ssd,psr"))
