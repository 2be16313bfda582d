"""Texts that a study was never aimed at: whole spans, other tasks, and what the teacher-forced loss makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from spd_lens import tasks
from spd_lens.evaluation.outcomes import other_texts
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.study.config import StudyConfig
from spd_lens.study.side_effects import SYNTHETIC, held_out_texts, side_effect_examples
from spd_lens.subspaces.policy import Policy

DATA = Path(__file__).parents[3] / "shared" / "data"


def config(**settings):
    return StudyConfig.make({"sources": ["synthetic-math"], "n_side_effects": 5, **settings})


def whole(items):
    return all(item.spans == ((0, len(item.completion)),) for item in items)


def test_other_tasks_and_neutral_prose_with_whole_spans():
    found = side_effect_examples(config())
    assert list(found) == ["synthetic-code", "synthetic-qa", "neutral"]
    assert all(len(items) == 5 and whole(items) for items in found.values())
    test_items = {item.id for item in tasks.get("synthetic-code").test(5, 42)}
    assert {item.id for item in found["synthetic-code"]} == test_items


def test_what_the_study_measures_anyway_is_left_out():
    both = config(sources=["synthetic-math"], targets=["synthetic-math", "synthetic-qa"])
    assert list(side_effect_examples(both)) == ["synthetic-code", "neutral"]
    assert side_effect_examples(config(n_side_effects=0)) == {}


@pytest.mark.skipif(not DATA.is_dir(), reason="no benchmark data beside the checkout")
def test_benchmarks_count_where_their_files_are(tmp_path):
    for name in ("svamp", "bbh"):
        shutil.copytree(DATA / name, tmp_path / name)
    there = side_effect_examples(config(settings={"data_dir": str(tmp_path)}))
    assert list(there) == ["synthetic-code", "synthetic-qa", "svamp", "bbh", "neutral"]
    assert all(len(items) == 5 and whole(items) for items in there.values())
    target = config(targets=["svamp"], settings={"data_dir": str(tmp_path)})
    assert "svamp" not in side_effect_examples(target)
    many = held_out_texts(tasks.get("svamp", tmp_path), 10**6)
    assert len(many) == len(tasks.get("svamp", tmp_path).pool("test"))


def test_other_texts_are_24_short_paragraphs_of_their_own():
    texts = other_texts()
    assert len(texts) == 24 and whole(texts)
    assert len({item.id for item in texts}) == len({item.prompt for item in texts}) == 24
    assert all(100 < len(item.completion) < 400 and item.completion.isascii() for item in texts)
    assert not any(character.isdigit() for item in texts for character in item.completion)
    assert other_texts() is not texts  # a caller may change its list
    assert len(side_effect_examples(config(n_side_effects=100))["neutral"]) == 24


def test_texts_that_do_not_fit_the_context_are_left_out(tiny_pair):
    found = side_effect_examples(config(n_side_effects=24), tiny_pair)
    assert set(found) <= {*SYNTHETIC, "neutral"} and found["neutral"]
    every = side_effect_examples(config(n_side_effects=24))
    for name, items in every.items():
        fitting = [e for e in items if len(tiny_pair.format.joint(e).ids) <= tiny_pair.n_ctx]
        assert found.get(name, []) == fitting


def test_the_aligned_loss_of_a_text_is_its_nll_per_token(tiny_pair):
    items = side_effect_examples(config(n_side_effects=3), tiny_pair)["neutral"]
    measured = teacher_forced(tiny_pair, items, [Policy("base")], progress=False)["base"]
    for item, found in zip(items, measured, strict=True):
        encoded = tiny_pair.encode(item)
        with torch.no_grad():
            log_p = tiny_pair.hf(torch.tensor([encoded.ids])).logits[0].double().log_softmax(dim=-1)
        start = encoded.completion_start
        nll = [-log_p[t - 1, encoded.ids[t]].item() for t in range(start, len(encoded.ids))]
        assert found.aligned_loss == found.completion_loss == pytest.approx(sum(nll) / len(nll), rel=1e-5)
        assert found.kl == pytest.approx(0, abs=1e-6)
