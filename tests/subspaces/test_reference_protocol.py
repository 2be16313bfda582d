"""The extraction of the reference code (github.com/gh540-svg/hahaha, commit e249fec), written out from its description.

`Reference` is plain PyTorch and transformers and shares nothing with the library: one text at a time, hooks on the
outputs of `k_proj` and `v_proj`, `backward`, all rows stacked, their mean taken off, `torch.linalg.svd`. The library's
settings of that protocol must find the same tokens, the same losses, the same rows and the same subspaces.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import spd_lens as spd
from spd_lens.examples import Example
from spd_lens.sites import Site
from spd_lens.subspaces.extract import token_gradients
from tests.conftest import BACKENDS, build_tokenizer, randomise
from tests.helpers import norms_in_full_precision, refused, relative_error

CUT = 256
"""Tokens behind which the reference code cuts a calibration text."""


@dataclass
class Reference:
    """The protocol on a Hugging Face model, in the model's own dtype."""

    hf: torch.nn.Module
    tokenizer: object
    ids: list[list[int]] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)

    @property
    def blocks(self):
        n = self.hf.config.num_hidden_layers
        return [n - 1, n // 2]

    def add(self, text, spans):
        """The gradient row of every token of one text, whose spans are character ranges."""
        read = self.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=CUT)
        ids = read["input_ids"]
        scored = [
            t for t, (low, high) in enumerate(read["offset_mapping"])
            if t > 0 and high > low and any(start <= low and high <= end for start, end in spans)
        ]  # fmt: skip
        outputs, handles = {}, []
        for block in self.blocks:
            for name in ("k", "v"):
                module = getattr(self.hf.model.layers[block].self_attn, f"{name}_proj")

                def keep(_module, _args, output, place=(block, name)):
                    output.retain_grad()
                    outputs[place] = output

                handles.append(module.register_forward_hook(keep))
        try:
            logits = self.hf(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        log_p = logits.log_softmax(dim=-1)
        loss = torch.stack([-log_p[t - 1, ids[t]] for t in scored]).mean()
        loss.backward()
        self.ids.append(ids)
        self.scored.append(scored)
        self.losses.append(loss.item())
        for place, output in outputs.items():
            self.rows.setdefault(place, []).append(output.grad[0].double())

    def svd(self, place, *, centred=True):
        """Singular values, and right singular vectors as columns, of all rows around their mean."""
        g = torch.cat(self.rows[place])
        _, values, right = torch.linalg.svd(g - g.mean(dim=0) if centred else g, full_matrices=False)
        return values, right.T

    def energy_rank(self, place, share=0.95):
        """The smallest rank whose squared singular values are at least that share of all."""
        squares = self.svd(place)[0].square().tolist()
        return next(r for r in range(1, len(squares) + 1) if sum(squares[:r]) >= share * sum(squares))


def mean_squared_cosine(a, b):
    """Of the principal angles between two subspaces of equal rank."""
    return (torch.linalg.svdvals(a.T @ b).square().sum() / a.shape[1]).item()


def example(prompt, completion, *, ask=(), answer=()):
    """An example whose spans are the first places of some pieces of its prompt and of its completion."""
    inside = [(prompt.index(piece), prompt.index(piece) + len(piece)) for piece in ask]
    spans = [(completion.index(piece), completion.index(piece) + len(piece)) for piece in answer]
    return Example(prompt, completion, spans, prompt[:20], prompt_spans=inside)


EXAMPLES = [
    example("Question: How many 🍎 are 12 🍎 and 30 🍎?\nAnswer:", " 12 + 30 = 42 🍎🎉 in all.", answer=["42 🍎"]),
    example("Question: 三个苹果加四个苹果是多少？\nAnswer:", " 一共是七个苹果。", answer=["七个"]),
    example("Question: Tom has 12 apples. How many are left?\nAnswer:", " 12 apples are 12. The answer is 12.",
            answer=["pples are", "nswer is 12"]),
    example("Instruction: Do.\nYour code should pass these tests:\nassert add(2, 3) == 5\nassert add(0, 1) == 1\nCode:",
            " def add(a, b):\n    return a + b", ask=["assert add(2, 3) == 5", "assert add(0, 1) == 1"]),
    example("assert f(7) == 21\nCode:", " def f(n):\n    return 3 * n", ask=["assert f(7) == 21"], answer=["3 * n"]),
    example("Question: Which planet is the largest?\nA. Mars\nB. Jupiter\nAnswer:", " B", answer=[" B"]),
    example("Question: Count.\nAnswer:", " It is 21. " + "One more is 🍎, and 7 * 3 is 21. " * 30, answer=[" 21"]),
    example("Question: été €\nAnswer:", " 15 * 4 = 60 €\n#### 60", answer=["60 €", "#### 60"]),
]  # fmt: skip
"""Characters of several tokens, spans that begin inside a token, several spans, spans in the prompt (one at the very
beginning of the text), and a text far beyond the cut."""

MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, 5, False),  # biases on k and v; nothing before the text
    "llama": (LlamaForCausalLM, LlamaConfig, 4, True),  # no biases; BOS before the text
}


@pytest.fixture(scope="module", params=MODELS)
def hf_and_tokenizer(request):
    """A model with two KV heads of eight dimensions for four query heads, in float64, and its tokenizer."""
    kind, config, n_layers, bos = MODELS[request.param]
    tokenizer = build_tokenizer(chat=True, bos=bos)
    hf = kind(
        config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=n_layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip
    return randomise(hf, seed=3).double(), tokenizer


@pytest.fixture(scope="module")
def reference(hf_and_tokenizer):
    hf, tokenizer = hf_and_tokenizer
    found = Reference(copy.deepcopy(hf), tokenizer)
    with norms_in_full_precision():
        for one in EXAMPLES:
            start = len(one.prompt)
            found.add(one.prompt + one.completion, [*one.prompt_spans, *((start + a, start + b) for a, b in one.spans)])
    return found


SETTINGS = {"layers": "last_mid_from_0", "max_calibration_tokens": CUT}


def pair_in(hf_and_tokenizer, dtype, backend="auto"):
    hf, tokenizer = hf_and_tokenizer
    return spd.ModelPair(
        copy.deepcopy(hf).to(dtype), tokenizer, name="tiny", backend=backend, prompt_format="verbatim",
        span_rule="inside",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(hf_and_tokenizer):
    return pair_in(hf_and_tokenizer, torch.float64)


@pytest.fixture(scope="module")
def moments(pair):
    with norms_in_full_precision():
        return spd.extract(pair, EXAMPLES, engine="twin", progress=False, **SETTINGS)


def sites_of(reference):
    return {Site(block, kind): (block, kind) for block in reference.blocks for kind in ("k", "v")}


def test_the_texts_are_as_hard_as_they_should_be(reference, hf_and_tokenizer):
    _, tokenizer = hf_and_tokenizer
    whole = [tokenizer(one.prompt + one.completion, return_offsets_mapping=True) for one in EXAMPLES]
    assert [len(read["input_ids"]) > CUT for read in whole] == [one is EXAMPLES[6] for one in EXAMPLES]
    assert min(len(ids) for ids in reference.ids) < CUT == max(len(ids) for ids in reference.ids)
    offsets = whole[0]["offset_mapping"]
    assert any(offsets[t] == offsets[t + 1] for t in reference.scored[0][:-1]), "no scored character of several tokens"
    start = len(EXAMPLES[2].prompt)
    overlapping = [
        t for t, (low, high) in enumerate(whole[2]["offset_mapping"])
        if any(low < start + b and high > start + a for a, b in EXAMPLES[2].spans)
    ]  # fmt: skip
    assert set(reference.scored[2]) < set(overlapping), "no span begins inside a token"
    for place in reference.rows:
        values, _ = reference.svd(place)
        gap = values[7] - values[8]
        assert gap > 1e-3 * values[0], "half rank names no subspace"


def test_the_same_tokens_count_and_cost_the_same(pair, reference):
    with norms_in_full_precision():
        found = {
            rows.index: rows for rows in token_gradients(pair, EXAMPLES, engine="twin", progress=False, **SETTINGS)
        }
    for i in range(len(EXAMPLES)):
        assert found[i].encoded.ids == reference.ids[i]
        assert found[i].encoded.scored == reference.scored[i]
        assert found[i].loss == pytest.approx(reference.losses[i], rel=1e-10)
        for site, place in sites_of(reference).items():
            assert relative_error(found[i].gradient[site], reference.rows[place][i]) < 1e-9, (i, site)


def test_the_same_singular_values_and_subspaces(moments, reference):
    assert moments.sites == sorted(sites_of(reference))
    assert moments.mean_loss == pytest.approx(sum(reference.losses) / len(EXAMPLES), rel=1e-10)
    subspace = moments.subspace(0.5, per_head=False, center_gradients=True)
    for site, place in sites_of(reference).items():
        values, right = reference.svd(place)
        width = right.shape[0]
        own = moments.singular_values(site, per_head=False, center_gradients=True)[0]
        assert torch.allclose(own, values, rtol=1e-6, atol=1e-7 * values[0].item())
        (basis,) = subspace.blocks(site)
        assert basis.shape == (width, width // 2)
        assert mean_squared_cosine(basis, right[:, : width // 2]) > 1 - 1e-10
        raw = reference.svd(place, centred=False)[1][:, : width // 2]
        assert mean_squared_cosine(raw, right[:, : width // 2]) < 1 - 1e-6, "the mean makes no difference here"


def test_the_same_rank_of_an_energy(moments, reference):
    subspace = moments.subspace(energy=0.95, per_head=False, center_gradients=True)
    for site, place in sites_of(reference).items():
        rank = reference.energy_rank(place)
        assert subspace.ranks[site] == (rank,)
        (basis,) = subspace.blocks(site)
        assert mean_squared_cosine(basis, reference.svd(place)[1][:, :rank]) > 1 - 1e-10


@pytest.mark.parametrize("engine", ["twin", *BACKENDS])
def test_the_same_subspaces_in_float32(hf_and_tokenizer, reference, engine):
    on_lens = engine != "twin"
    pair = pair_in(hf_and_tokenizer, torch.float32, engine if on_lens else "auto")
    moments = spd.extract(pair, EXAMPLES, engine="lens" if on_lens else "twin", progress=False, **SETTINGS)
    subspace = moments.subspace(0.5, per_head=False, center_gradients=True)
    for site, place in sites_of(reference).items():
        _, right = reference.svd(place)
        (basis,) = subspace.blocks(site)
        assert mean_squared_cosine(basis, right[:, : right.shape[0] // 2]) > 0.9999


def test_a_text_whose_answer_is_behind_the_cut_is_refused(pair):
    with refused("'Question: Which plan'", "no scored token among its first 8 tokens", "--too-long drop"):
        spd.extract(pair, [EXAMPLES[5]], max_calibration_tokens=8, engine="twin", progress=False)
