"""Gradients of texts much longer than a sliding window: a batch of them against one text at a time, masked by hand."""

import copy

import pytest
import torch

from spd_lens.examples import Example
from spd_lens.models.pair import ModelPair
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from tests.conftest import N_CTX, build_tokenizer
from tests.helpers import refused, relative_error
from tests.models.zoo import build_twin

WINDOW = 16
LENGTHS = (N_CTX, N_CTX - 1, 200, 131, 40, 12)
"""In tokens; the first is as long as the context, all but the last are beyond the window."""


def example_of(pair, n_tokens):
    """A text of so many tokens, of which the last one is scored and one in its middle."""
    words = "Tom has 12 apples and buys 30 more. "
    completion = "It is 42 and 7"
    for size in range(4 * n_tokens):
        found = Example((words * n_tokens)[:size], completion, [(6, 8), (13, 14)], str(n_tokens))
        if len(pair.format.joint(found).ids) == n_tokens:
            return found
    raise AssertionError(n_tokens)


def reference_moments(pair, examples, window=WINDOW):
    """`Σ gᵀg` at every K and V: each text alone and in float64; a token sees itself and the `window - 1` before it."""
    wide = copy.deepcopy(pair.hf).double()
    moments = {site: 0.0 for site in pair.sites("all")}
    for example in examples:
        e = pair.encode(example)
        ids = torch.tensor([e.ids])
        place = torch.arange(len(e.ids))
        before = place[:, None] - place[None, :]
        causal, local = (
            torch.zeros(before.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
            for seen in (before >= 0, (before >= 0) & (before < window))
        )
        mask = {"full_attention": causal, "sliding_attention": local} if hasattr(wide.config, "layer_types") else local
        outputs = {}
        handles = [
            getattr(wide.model.layers[site.layer].self_attn, f"{site.kind}_proj").register_forward_hook(
                lambda _module, _args, output, site=site, outputs=outputs: outputs.__setitem__(site, output)
            )
            for site in moments
        ]
        embeddings = wide.get_input_embeddings()(ids).detach().requires_grad_()
        log_p = wide(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[0].log_softmax(dim=-1)
        loss = -sum(log_p[t - 1, e.ids[t]] for t in e.scored) / len(e.scored)
        for site, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            moments[site] = moments[site] + g[0].T @ g[0]
        for handle in handles:
            handle.remove()
    return moments


@pytest.fixture(scope="module", params=["mistral", "gemma2", "gemma3_text"])
def windowed(request):
    """A pair with a window of 16 tokens (in Gemma in some of the layers), texts and their moments."""
    pair = ModelPair(build_twin(request.param, torch.float32), build_tokenizer(chat=False))
    assert pair.hf.config.sliding_window == WINDOW
    examples = [example_of(pair, n) for n in LENGTHS]
    return pair, examples, reference_moments(pair, examples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_beyond_the_window_is_one_text_at_a_time(windowed, dtype):
    pair, examples, reference = windowed
    # transformers computes norms and rotary angles in float32 whatever the dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6
    own = ModelPair(copy.deepcopy(pair.hf).to(dtype), pair.tokenizer)
    moments = extract(
        own, examples, layers="all", engine="twin", batch_tokens=len(LENGTHS) * N_CTX, progress=False
    )  # fmt: skip
    assert moments.sites == sorted(reference)
    for site, expected in reference.items():
        assert relative_error(moments.gradient[site].sum(0), expected) < tolerance, site


def test_the_window_matters(windowed):
    """Or the test above would pass without it."""
    pair, examples, reference = windowed
    unmasked = reference_moments(pair, examples, window=N_CTX)
    assert max(relative_error(unmasked[site], reference[site]) for site in reference) > 0.1
    assert relative_error(unmasked[Site(3, "v")], reference[Site(3, "v")]) > 1e-3


def test_one_token_more_than_the_context_is_refused(windowed):
    pair, examples, _ = windowed
    longer = example_of(pair, N_CTX + 1)
    with refused(f"'{N_CTX + 1}'", f"{N_CTX + 1} tokens", f"{N_CTX} tokens", "--too-long drop"):
        extract(pair, [*examples, longer], engine="twin", progress=False)
