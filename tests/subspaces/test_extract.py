"""Gradients of K, V and Q: against plain autograd, against finite differences, and whatever the batch."""

import importlib

import pytest
import torch

from spd_lens.examples import Example
from spd_lens.models.batches import batches_by_length
from spd_lens.models.load import load
from spd_lens.models.losses import token_losses
from spd_lens.models.pair import ModelPair
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract, fitting_tokens
from tests.conftest import BACKENDS
from tests.helpers import (
    ALL_KINDS,
    EXAMPLES,
    assert_same_bits,
    hook_at,
    norms_in_full_precision,
    reference_rows,
    refused,
    relative_error,
    sine,
)

PATHS = [("twin", "auto"), *(("lens", name) for name in BACKENDS)]


def taken(pair, engine="twin", examples=EXAMPLES, **options):
    return extract(pair, examples, engine=engine, progress=False, **options)


@pytest.fixture(scope="module")
def reference(pair_of):
    """Rows of the reference, computed once per model and loss."""
    made = {}

    def _reference(family, loss):
        if (family, loss) not in made:
            pair = pair_of(family)
            encoded = [pair.encode(example, loss) for example in EXAMPLES]
            made[family, loss] = reference_rows(pair.hf, encoded, pair.sites("all", ALL_KINDS))
        return made[family, loss]

    return _reference


@pytest.mark.parametrize("loss", ["aligned", "full"])
@pytest.mark.parametrize(("engine", "backend_name"), PATHS)
def test_moments_match_one_example_at_a_time_autograd(pair_of, reference, family, engine, backend_name, loss):
    pair = pair_of(family, backend_name)
    gradients, activations, losses = reference(family, loss)
    moments = taken(pair, engine, layers="all", kinds=ALL_KINDS, loss=loss)
    assert moments.sites == sorted(gradients)
    for site, g in gradients.items():
        x = activations[site]
        assert relative_error(moments.gradient[site].sum(0), g.T @ g) < 1e-4, site
        assert relative_error(moments.activation[site].sum(0), x.T @ x) < 1e-4, site
        assert relative_error(moments.activation_sum[site].sum(0), x.sum(0)) < 1e-4, site
        assert int(moments.n_tokens.sum()) == len(g)
    assert moments.mean_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert int(moments.n_examples.sum()) == len(EXAMPLES)


@pytest.mark.parametrize(("engine", "backend_name"), PATHS)
def test_a_float64_model_gives_float64_moments(pair_of, reference, family, engine, backend_name):
    pair = pair_of(family, backend_name, "float64")
    with norms_in_full_precision():
        moments = taken(pair, engine, layers="all", kinds=ALL_KINDS)
    # whatever the model's dtype, transformers computes rotary angles, and the bridge softmax, in float32
    tolerance = 1e-10 if engine == "twin" else 1e-5
    gradients, _, _ = reference(family, "aligned")
    for site, g in gradients.items():
        assert relative_error(moments.gradient[site].sum(0), g.T @ g) < tolerance, site


@pytest.mark.parametrize(("engine", "backend_name"), PATHS)
@pytest.mark.parametrize(("layers", "blocks"), [("last_mid", [1, 3]), ([2, 0], [0, 2]), (1, [1]), ("0, 3", [0, 3])])
def test_choosing_layers_changes_which_sites_and_not_what_they_hold(
    pair_of, reference, family, engine, backend_name, layers, blocks
):
    moments = taken(pair_of(family, backend_name), engine, layers=layers)
    assert moments.sites == [Site(layer, kind) for layer in blocks for kind in ("k", "v")]
    gradients, _, _ = reference(family, "aligned")
    for site in moments.sites:
        assert relative_error(moments.gradient[site].sum(0), gradients[site].T @ gradients[site]) < 1e-4, site


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_kind_alone(pair_of, reference, family, backend, kind):
    moments = taken(pair_of(family, backend), "lens", kinds=kind)
    assert moments.sites == [Site(1, kind), Site(3, kind)]
    g = reference(family, "aligned")[0][Site(1, kind)]
    assert relative_error(moments.gradient[Site(1, kind)].sum(0), g.T @ g) < 1e-4


@pytest.mark.parametrize("per_head", [True, False], ids=["per head", "joint"])
@pytest.mark.parametrize("rank", [0.5, 3])
def test_subspaces_match_the_full_singular_value_decomposition(pair_of, reference, family, per_head, rank):
    """Davis-Kahan: sin θ ≤ ‖error of the moments‖ / (gap of the squared singular values at r)."""
    moments = taken(pair_of(family), "lens", layers="all", kinds=ALL_KINDS)
    subspace = moments.subspace(rank, per_head=per_head)
    checked = 0
    for site, rows in reference(family, "aligned")[0].items():
        d_head = 32 if site.kind == "resid" else 8  # the residual stream has one block either way
        blocks = rows.split(d_head, dim=1) if per_head else [rows]
        measured = moments.blocks(site, per_head)
        assert subspace.bases[site].shape[:2] == (len(blocks), blocks[0].shape[1])
        for block, g in enumerate(blocks):
            _, sigma, right = torch.linalg.svd(g, full_matrices=True)
            # at the last layer only the predicting tokens' queries matter: 12 of them, less than half of 32
            kept = min(rank if isinstance(rank, int) else g.shape[1] // 2, int((sigma > 1e-9 * sigma[0]).sum()))
            assert subspace.ranks[site][block] == kept
            assert torch.allclose(subspace.singular_values[site][block], sigma, rtol=1e-3, atol=1e-4 * sigma[0])
            assert torch.allclose(
                moments.singular_values(site, per_head)[block], sigma, rtol=1e-3, atol=1e-4 * sigma[0]
            )
            error = torch.linalg.matrix_norm(measured[block] - g.T @ g, 2)
            gap = sigma[kept - 1] ** 2 - torch.linalg.eigvalsh(measured[block])[-kept - 1]
            bound = (error / gap).item()
            assert sine(subspace.bases[site][block], right[:kept].T) <= bound + 1e-9
            checked += bound < 0.01
    assert checked >= len(subspace.sites) / 2, "the bounds are too wide to prove anything"


@pytest.mark.parametrize("path", ["twin", "lens"])
@pytest.mark.parametrize("site", [Site(1, "k"), Site(3, "v"), Site(0, "q"), Site(2, "z"), Site(1, "resid")], ids=str)
def test_moments_match_finite_differences(pair_of, family, site, path):
    """Move one coordinate of every token's activation in turn and look at what the loss does."""
    pair = pair_of(family, "auto", "float64")
    example = EXAMPLES[4]
    head, coordinate, other = 1, 2, 5
    # the bridge computes softmax in float32, whose noise drowns a small step
    step, tolerance = (1e-3, 5e-3) if path == "lens" and pair.backend == "bridge" else (1e-5, 1e-5)
    e = pair.encode(example)
    tokens = torch.tensor([e.ids])

    def loss(position, which, change):
        def move(activation, hook=None):
            activation = activation.clone(memory_format=torch.contiguous_format)
            activation.view(1, len(e.ids), -1)[0, position, 8 * head + which] += change
            return activation

        with torch.no_grad():
            if path == "lens":
                logits = pair.lens.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(site.hook_name, move)])
            else:
                handle = hook_at(pair.hf, site, move)
                logits = pair.hf(tokens).logits
                handle.remove()
        log_p = logits[0].log_softmax(dim=-1)
        return -torch.stack([log_p[t - 1, e.ids[t]] for t in e.scored]).mean().item()

    def slopes(which):
        return torch.tensor(
            [(loss(j, which, step) - loss(j, which, -step)) / (2 * step) for j in range(len(e.ids))],
            dtype=torch.float64,
        )

    with norms_in_full_precision():
        first, second = slopes(coordinate), slopes(other)
        moments = taken(pair, path, [example], layers=site.layer, kinds=site.kind, shards=1)
    block = moments.blocks(site, per_head=False)[0, 8 * head : 8 * head + 8, 8 * head : 8 * head + 8]
    assert block[coordinate, coordinate] == pytest.approx((first @ first).item(), rel=tolerance)
    assert block[coordinate, other] == pytest.approx((first @ second).item(), rel=10 * tolerance)
    assert first.abs().max() > 1e-3, "nothing was measured"


def test_all_tokens_are_rows_and_tokens_after_the_last_scored_one_get_no_gradient(pair_of, family):
    """Eq. 8 stacks prompt and completion tokens; what follows the last prediction cannot matter to it."""
    pair = pair_of(family)
    encoded = [pair.encode(EXAMPLES[0])]
    gradients, _, _ = reference_rows(pair.hf, encoded, [Site(1, "k")])
    rows = gradients[Site(1, "k")]
    last = encoded[0].scored[-1]
    assert last < len(rows), "the example must go on after its span"
    assert (rows[1:last].norm(dim=1) > 0).all()
    assert (rows[last:] == 0).all()
    assert int(taken(pair, examples=EXAMPLES[:1]).n_tokens.sum()) == len(rows)


@pytest.mark.parametrize(("engine", "backend_name"), PATHS)
def test_padding_and_batch_size_change_nothing(pair_of, family, engine, backend_name):
    pair = pair_of(family, backend_name)
    alone, together = (taken(pair, engine, layers="all", batch_tokens=n) for n in (1, 10**6))
    for site in alone.sites:
        for name in ("gradient", "activation", "activation_sum"):
            one, all_at_once = getattr(alone, name)[site], getattr(together, name)[site]
            for shard in range(len(EXAMPLES)):  # six examples in eight shards: one each
                assert relative_error(all_at_once[shard], one[shard]) < 1e-5, (site, name, shard)
    assert torch.equal(alone.n_tokens, together.n_tokens)
    assert torch.equal(alone.n_scored, together.n_scored)
    assert torch.allclose(alone.loss_sum, together.loss_sum, rtol=1e-5)


@pytest.mark.parametrize("engine", ["twin", "lens"])
def test_extraction_leaves_the_models_as_they_were(pair_of, state_of, family, backend, engine):
    pair = pair_of(family, backend)
    twin, lens = state_of(pair.hf), state_of(pair.lens)
    tokens = torch.tensor([pair.encode(EXAMPLES[0]).ids])
    before = pair.lens(tokens, return_type="logits")
    taken(pair, engine)
    assert_same_bits(pair.hf, twin)
    assert_same_bits(pair.lens, lens)
    assert not any(p.requires_grad for model in (pair.hf, pair.lens) for p in model.parameters())
    assert not any(p.grad is not None for model in (pair.hf, pair.lens) for p in model.parameters())
    assert torch.equal(pair.lens(tokens, return_type="logits"), before)
    assert not any(module._forward_hooks for module in pair.hf.modules())


def test_half_precision_finds_the_same_directions(pair_of, family):
    exact = taken(pair_of(family)).subspace(1, per_head=False)
    rough = taken(pair_of(family, "auto", "bfloat16"))
    for site in exact.sites:
        assert rough.gradient[site].dtype == torch.float64
        assert sine(rough.subspace(1, per_head=False).bases[site][0], exact.bases[site][0]) < 0.2, site


def test_float16_gradients_do_not_underflow(pair_of):
    """A loss that hardly depends on K has gradients near float16's smallest number; the scale is taken out again."""
    exact, half = taken(pair_of("llama"), layers="all"), taken(pair_of("llama", "auto", "float16"), layers="all")
    for site in exact.sites:
        assert relative_error(half.gradient[site].sum(0), exact.gradient[site].sum(0)) < 0.1, site


def test_losses_are_in_nats_and_double_precision():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]], dtype=torch.bfloat16)
    losses = token_losses(logits, torch.tensor([1, 0]))
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([0.6931471805599453, 0.1269280110429725], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slopes_of_losses_are_those_of_autograd_in_float64(dtype):
    """In more rows than are taken at a time, over a vocabulary so large that float32 sums would show."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(70, 50_000)).to(dtype)
    targets = logits.argmax(dim=-1).where(torch.arange(70) % 2 == 0, torch.arange(70))
    weights = torch.rand(70, dtype=torch.float64)
    wide, own = logits.clone().double().requires_grad_(), logits.clone().requires_grad_()
    (torch.nn.functional.cross_entropy(wide, targets, reduction="none") * weights).sum().backward()
    (token_losses(own, targets) * weights).sum().backward()
    assert own.grad.dtype == dtype
    assert relative_error(own.grad.double(), wide.grad) < 2 * torch.finfo(dtype).eps


def test_batches_hold_each_example_once_and_at_most_so_many_padded_tokens():
    lengths = [5, 9, 1, 7, 7, 30, 2]
    batches = batches_by_length(lengths, 18)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [5], "the longest comes first, alone where it exceeds the limit"
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 18 for batch in batches)
    assert len(batches) < 6


def test_the_last_block_runs_only_where_a_scored_token_is_predicted(tiny_pair):
    scored = sum(len(tiny_pair.encode(example).scored) for example in EXAMPLES)
    tokens = sum(len(tiny_pair.encode(example).ids) for example in EXAMPLES)
    *_, before, last = tiny_pair.hf.model.layers
    seen: dict[str, int] = {}

    def count(name):
        def hook(module, args, out):
            if torch.is_grad_enabled():  # a short pass before, which finds out whether that is exact, makes no gradient
                seen[name] = seen.get(name, 0) + out.shape[:-1].numel()

        return hook

    layers = {"q": last.self_attn.q_proj, "o": last.self_attn.o_proj, "down": last.mlp.down_proj}
    layers |= {"k": last.self_attn.k_proj, "before": before.mlp.down_proj}
    for kinds in (("k", "v"), ("k", "v", "z")):
        seen.clear()
        handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
        extract(tiny_pair, EXAMPLES, kinds=kinds, engine="twin", batch_tokens=1, progress=False)
        for handle in handles:
            handle.remove()
        inside = scored if kinds == ("k", "v") else tokens  # z's own activations are wanted everywhere
        assert seen == {"q": inside, "o": inside, "down": inside, "k": tokens, "before": tokens}


def test_batches_fit_the_free_memory(tiny_pair, monkeypatch):
    per_token = 34 * 2 * tiny_pair.fingerprint.d_model * 4
    for tokens, expected in ((0.2, 1), (100.5, 100), (1e9, 1024)):
        monkeypatch.setattr(
            importlib.import_module("spd_lens.subspaces.extract"),
            "free_memory",
            lambda device, t=tokens: 2 * t * per_token,
        )
        assert fitting_tokens(tiny_pair, 2) == expected


def test_a_lens_model_of_a_smaller_context_is_not_asked_for_more(pair_of, backend, caplog, monkeypatch):
    """TransformerLens builds Mistral's lens model for 2,048 tokens, whatever its configuration says."""
    tiny_pair = pair_of("llama", backend)
    example = Example("a long enough prompt", "and an answer", ((0, 3),), "one")
    n_tokens = len(tiny_pair.encode(example).ids)
    monkeypatch.setattr(tiny_pair.lens.cfg, "n_ctx", n_tokens - 1)
    with refused("'one'", f"{n_tokens} tokens", f"context of {n_tokens - 1}", "engine='twin'"):
        extract(tiny_pair, [example], engine="lens", progress=False)
    extract(tiny_pair, [example], engine="twin", progress=False)
    monkeypatch.setattr(tiny_pair.lens.cfg, "n_ctx", n_tokens)
    extract(tiny_pair, [example], engine="lens", progress=False)
    any_lens = ModelPair(tiny_pair.hf, tiny_pair.tokenizer)
    monkeypatch.setattr(any_lens.lens.cfg, "n_ctx", n_tokens - 1)
    extract(any_lens, [example], progress=False)
    assert any_lens.backend == "bridge"
    assert f"takes {n_tokens - 1} tokens, not {n_tokens}" in caplog.text or "captured on the twin" in caplog.text


# texts that are cut


@pytest.mark.parametrize("path", ["twin", "lens"])
def test_a_cut_text_gives_the_rows_of_the_text_that_is_left(pair_of, family, path):
    """No token attends to what follows it, so a cut only takes rows and scored tokens away."""
    pair = pair_of(family)
    example = EXAMPLES[2]  # two spans
    whole = pair.encode(example)
    most = whole.scored[-1] - 1
    assert whole.scored[0] < most < whole.scored[-1] < len(whole.ids)
    ids, scored = whole.ids[:most], [t for t in whole.scored if t < most]
    cut = type(whole)(ids, whole.completion_start, scored)
    sites = pair.sites("all", ALL_KINDS)
    gradients, activations, losses = reference_rows(pair.hf, [cut], sites)
    moments = taken(pair, path, [example], layers="all", kinds=ALL_KINDS, max_calibration_tokens=most)
    for site in sites:
        g, x = gradients[site], activations[site]
        assert relative_error(moments.gradient[site].sum(0), g.T @ g) < 1e-4, site
        assert relative_error(moments.activation_sum[site].sum(0), x.sum(0)) < 1e-4, site
    assert (int(moments.n_tokens.sum()), int(moments.n_scored.sum())) == (most, len(scored))
    assert moments.mean_loss == pytest.approx(losses[0], rel=1e-5)


def test_a_text_beyond_the_context_can_be_cut_to_fit(tiny_pair):
    long = Example("7 * 3", "It is 21. " + "one more is 22. " * 400, [(6, 8)], "long")
    with refused("'long'", "context"):
        taken(tiny_pair, examples=[long])
    with refused("'long'", "context"):
        taken(tiny_pair, examples=[long], max_calibration_tokens=10_000)
    moments = taken(tiny_pair, examples=[long], max_calibration_tokens=40)
    assert int(moments.n_tokens.sum()) == 40


def test_a_cut_that_leaves_nothing_to_score_is_refused(tiny_pair):
    with refused("'apples'", "no scored token among its first 5 tokens", "--too-long drop"):
        taken(tiny_pair, max_calibration_tokens=5)
    for wrong in (1, 0, 2.5, "9", True):
        with refused("max_calibration_tokens", "at least 2"):
            taken(tiny_pair, max_calibration_tokens=wrong)


def test_moments_say_that_their_texts_were_cut_or_scored_in_another_way(tiny_llama_dir, tiny_pair):
    usual = taken(tiny_pair)
    assert set(usual.settings) == {"loss", "dtype"}
    cut = taken(tiny_pair, max_calibration_tokens=200)
    assert cut.settings == usual.settings | {"max_calibration_tokens": 200}
    other = load(str(tiny_llama_dir), dtype="float32", device="cpu", prompt_format="verbatim", span_rule="inside",
                 add_special_tokens=False)  # fmt: skip
    inside = [Example("7 * 3 =", " 21", [(0, 3)])]
    found = taken(other, examples=inside).settings
    assert found == usual.settings | {
        "prompt_format": "verbatim", "span_rule": "inside", "add_special_tokens": False,
    }  # fmt: skip
    for unlike in (cut, taken(other, examples=inside)):
        with refused("settings", "do not add"):
            usual + unlike
