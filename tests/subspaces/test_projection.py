"""The projection as hooks and as weights: the same, exactly undone, and loud when something is amiss."""

import copy
import inspect
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from spd_lens.models.adapters import adapted, merged_copy
from spd_lens.models.batches import right_pad
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.projection import fold_to, folded, projected
from tests.helpers import ALL_KINDS, EXAMPLES, assert_same_bits, greedy, hook_at, make_adapter, refused

FORMS = {
    "per head": {"rank": 0.5},
    "joint": {"rank": 5, "per_head": False},
    "centred": {"rank": 3, "center": True},
    "all kinds": {"rank": 4, "kinds": ALL_KINDS},
    "all kinds, centred": {"rank": 4, "kinds": ALL_KINDS, "center": True},
}


@pytest.fixture(scope="module")
def subspace_of(pair_of):
    made = {}

    def _subspace_of(family, form="per head"):
        if (family, form) not in made:
            options = dict(FORMS[form])
            kinds = options.pop("kinds", ("k", "v"))
            moments = extract(pair_of(family), EXAMPLES, engine="twin", kinds=kinds, progress=False)
            made[family, form] = moments.subspace(**options)
        return made[family, form]

    return _subspace_of


@pytest.fixture
def batch(pair_of, family):
    """Right-padded tokens of unequal length and their mask."""
    pair = pair_of(family)
    return right_pad([pair.encode(example).ids for example in EXAMPLES], pair.tokenizer.pad_token_id, "cpu")


def lens_logits(lens, tokens, mask=None):
    return lens(tokens, attention_mask=mask, return_type="logits")


def twin_logits(hf, tokens, mask=None):
    return hf(input_ids=tokens, attention_mask=mask).logits


@torch.no_grad()
def by_hand(hf, subspace, strength, tokens, mask):
    """The definition, Eq. 12, by hooks on the twin that use nothing but the projector matrices."""
    handles = []
    for site in subspace.sites:
        projector, mean = subspace.projector(site).float(), subspace.offset.get(site)

        def hook(activation, projector=projector, mean=mean):
            x = activation.unflatten(-1, projector.shape[:2])
            mu = 0 if mean is None else mean.float()
            moved = torch.einsum("...bi,bij->...bj", x - mu, projector) + mu
            return ((1 - strength) * x + strength * moved).flatten(-2)

        handles.append(hook_at(hf, site, hook))
    try:
        return twin_logits(hf, tokens, mask)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_hooks_and_folded_weights_are_the_same_projection(pair_of, subspace_of, family, backend, batch, form, strength):
    pair, subspace = pair_of(family, backend), subspace_of(family, form)
    tokens, mask = batch
    with torch.no_grad():
        plain = twin_logits(pair.hf, tokens, mask)[mask.bool()]
        with projected(pair.lens, subspace, strength):
            hooked = lens_logits(pair.lens, tokens, mask)[mask.bool()]
        with folded(pair.hf, subspace, strength):
            in_weights = twin_logits(pair.hf, tokens, mask)[mask.bool()]
        definition = by_hand(pair.hf, subspace, strength, tokens, mask)[mask.bool()]
    assert (definition - plain).abs().max() > 0.1, "the projection does nothing here"
    scale = plain.std()
    assert (in_weights - definition).abs().max() < 1e-4 * scale
    assert (hooked - definition).abs().max() < 1e-4 * scale


def test_strength_zero_is_the_identity_bit_for_bit(pair_of, subspace_of, state_of, family, backend, batch):
    pair = pair_of(family, backend)
    tokens, mask = batch
    for form in FORMS:
        subspace, state = subspace_of(family, form), state_of(pair.hf)
        with torch.no_grad():
            before, before_twin = lens_logits(pair.lens, tokens, mask), twin_logits(pair.hf, tokens, mask)
            with projected(pair.lens, subspace, strength=0.0) as projection:
                assert torch.equal(lens_logits(pair.lens, tokens, mask), before)
            assert set(projection.firings.values()) == {1}
            with folded(pair.hf, subspace, strength=0.0):
                assert_same_bits(pair.hf, state)
                assert torch.equal(twin_logits(pair.hf, tokens, mask), before_twin)


@pytest.mark.parametrize("form", ["per head", "centred"])
def test_greedy_tokens_under_hooks_are_those_of_the_folded_twin_with_its_cache(
    pair_of, subspace_of, family, backend, form
):
    pair, subspace = pair_of(family, backend), subspace_of(family, form)
    changed = 0
    for example in EXAMPLES[:3]:
        ids = pair.prompt_ids(example)
        with projected(pair.lens, subspace):
            under_hooks = greedy(lambda tokens: lens_logits(pair.lens, tokens), ids, 12)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        with folded(pair.hf, subspace), torch.no_grad():
            from_weights = pair.hf.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        assert under_hooks == from_weights
        plain = pair.hf.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        changed += plain != from_weights
    assert changed, "the projection changes no token, so nothing was compared"


def test_the_weights_come_back_bit_for_bit(pair_of, subspace_of, state_of, family):
    hf, subspace = pair_of(family).hf, subspace_of(family, "centred")
    state = state_of(hf)
    biases = [layer.self_attn.k_proj.bias is None for layer in hf.model.layers]
    with folded(hf, subspace) as model:
        assert model is hf
        key = "model.layers.1.self_attn.k_proj.weight"
        assert not torch.equal(hf.state_dict()[key], state[key])
    assert_same_bits(hf, state)
    with pytest.raises(KeyboardInterrupt), folded(hf, subspace):
        raise KeyboardInterrupt
    assert_same_bits(hf, state)

    def leaves_early():
        with folded(hf, subspace):
            return 1

    def yields():
        with folded(hf, subspace):
            yield 1
            yield 2

    leaves_early()
    generator = yields()
    next(generator)
    generator.close()
    assert_same_bits(hf, state)
    assert [layer.self_attn.k_proj.bias is None for layer in hf.model.layers] == biases
    assert not any(p.requires_grad for p in hf.parameters())


def test_the_weights_come_back_in_bfloat16(pair_of, subspace_of, state_of, family, batch):
    pair, subspace = pair_of(family, "auto", "bfloat16"), subspace_of(family)
    tokens, mask = batch
    state = state_of(pair.hf)
    with torch.no_grad():
        with folded(pair.hf, subspace):
            assert pair.hf.model.layers[1].self_attn.k_proj.weight.dtype == torch.bfloat16
            rough = twin_logits(pair.hf, tokens, mask)[mask.bool()].float()
        exact = by_hand(pair_of(family).hf, subspace, 1.0, tokens, mask)[mask.bool()]
    assert_same_bits(pair.hf, state)
    assert (rough - exact).pow(2).mean().sqrt() < 0.1 * exact.std()


def test_folding_twice_is_projecting_twice(pair_of, subspace_of, state_of, family, batch):
    pair, one = pair_of(family), subspace_of(family)
    two = one.random_like(3)
    tokens, mask = batch
    state = state_of(pair.hf)
    with torch.no_grad():
        with projected(pair.lens, one), projected(pair.lens, two):
            hooked = lens_logits(pair.lens, tokens, mask)[mask.bool()]
        with projected(pair.lens, two), projected(pair.lens, one):
            swapped = lens_logits(pair.lens, tokens, mask)[mask.bool()]
        with folded(pair.hf, one):
            within = state_of(pair.hf)
            with folded(pair.hf, two):
                in_weights = twin_logits(pair.hf, tokens, mask)[mask.bool()]
            assert_same_bits(pair.hf, within)
    assert_same_bits(pair.hf, state)
    assert (hooked - in_weights).abs().max() < 1e-4 * hooked.std()
    assert (hooked - swapped).abs().max() > 0.01, "projections do not commute, so their order must show"


def hook_counts(lens):
    return {name: len(point._forward_hooks) for name, point in lens.hook_dict.items()}


def test_hooks_come_off_after_the_context_whatever_happens_in_it(pair_of, subspace_of, family, backend, batch):
    lens, subspace = pair_of(family, backend).lens, subspace_of(family)
    tokens, mask = batch
    counts = hook_counts(lens)
    with torch.no_grad():
        before = lens_logits(lens, tokens, mask)

        def same():
            return hook_counts(lens) == counts and torch.equal(lens_logits(lens, tokens, mask), before)

        with projected(lens, subspace):
            assert not torch.equal(lens_logits(lens, tokens, mask), before)
        assert same()
        with pytest.raises(ZeroDivisionError), projected(lens, subspace):
            1 / 0  # noqa: B018 (raises, which is the point)
        assert same()

        def leaves_early():
            with projected(lens, subspace):
                return lens_logits(lens, tokens, mask)

        def yields():
            with projected(lens, subspace):
                yield lens_logits(lens, tokens, mask)
                yield None

        assert not torch.equal(leaves_early(), before)
        assert same()
        generator = yields()
        next(generator)
        generator.close()
        assert same()
        with projected(lens, subspace):
            lens_logits(lens, tokens, mask)
            with projected(lens, subspace.random_like(0)):
                lens_logits(lens, tokens, mask)
            once = lens_logits(lens, tokens, mask)
        assert torch.equal(once, leaves_early()), "the inner context's end must leave the outer projection on"
        assert same()


def test_firings_count_forward_passes_per_site(pair_of, subspace_of, family, backend, batch):
    lens, subspace = pair_of(family, backend).lens, subspace_of(family)
    with projected(lens, subspace) as projection:
        assert projection.firings == dict.fromkeys(subspace.sites, 0)
        for _ in range(3):
            lens_logits(lens, *batch)
    assert projection.firings == dict.fromkeys(subspace.sites, 3)
    assert "1.k: 3" in repr(projection)


def test_a_projection_that_never_fires_says_so(pair_of, subspace_of, family, backend, batch):
    lens, subspace = pair_of(family, backend).lens, subspace_of(family)
    with pytest.warns(UserWarning, match=r"1\.k, 1\.v, 3\.k, 3\.v") as caught, projected(lens, subspace):
        pass
    here = inspect.currentframe().f_code.co_filename
    assert caught[0].filename == here, "the warning should point at the `with` line"
    with pytest.warns(UserWarning, match=r"never fired at 3\.k, 3\.v"), projected(lens, subspace):
        if pair_of(family, backend).backend == "hooked":
            lens(batch[0], stop_at_layer=2)
        else:
            lens.hook_dict["blocks.1.attn.hook_k"](torch.zeros(1, 1, 2, 8))
            lens.hook_dict["blocks.1.attn.hook_v"](torch.zeros(1, 1, 2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with projected(lens, subspace):
            lens_logits(lens, *batch)


def test_resetting_the_hooks_inside_is_noticed(pair_of, subspace_of, family, backend, batch):
    lens, subspace = pair_of(family, backend).lens, subspace_of(family)
    counts = hook_counts(lens)
    with refused("reset_hooks()", "not projected"), projected(lens, subspace):
        lens_logits(lens, *batch)
        lens.reset_hooks()
        lens_logits(lens, *batch)
    assert hook_counts(lens) == counts
    with pytest.raises(ZeroDivisionError), projected(lens, subspace):  # an error inside is the one to report
        lens.reset_hooks()
        1 / 0  # noqa: B018 (raises, which is the point)
    assert hook_counts(lens) == counts


def test_run_with_hooks_and_run_with_cache_inside_see_projected_activations(
    pair_of, subspace_of, family, backend, batch
):
    lens, subspace = pair_of(family, backend).lens, subspace_of(family)
    site = Site(1, "k")
    seen = []
    tokens = batch[0]
    with projected(lens, subspace) as projection, torch.no_grad():
        _, cache = lens.run_with_cache(tokens, return_type="logits")
        after_cache = lens_logits(lens, tokens)
        lens.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=[(site.hook_name, lambda x, hook: seen.append(x.clone()))]
        )
        after_hooks = lens_logits(lens, tokens)
    assert set(projection.firings.values()) == {4}
    assert torch.equal(after_cache, after_hooks)
    with torch.no_grad():
        _, plain = lens.run_with_cache(tokens, return_type="logits")
    expected = subspace(plain[site.hook_name], site)
    assert not torch.allclose(plain[site.hook_name], expected, atol=0.01)
    assert torch.allclose(cache[site.hook_name], expected, atol=1e-5)
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_hooks_of_the_users_survive(pair_of, subspace_of, family, backend, batch):
    lens, subspace = pair_of(family, backend).lens, subspace_of(family)
    early, late = [], []
    point = lens.hook_dict["blocks.1.attn.hook_v"]
    try:
        lens.add_hook("blocks.1.attn.hook_v", lambda x, hook: early.append(x.clone()))
        with projected(lens, subspace), torch.no_grad():
            lens.add_hook("blocks.1.attn.hook_v", lambda x, hook: late.append(x.clone()))
            lens_logits(lens, *batch)
        with torch.no_grad():
            lens_logits(lens, *batch)
        assert len(early) == len(late) == 2
        site = Site(1, "v")
        assert torch.allclose(late[0], subspace(early[0], site), atol=1e-6), "added inside: sees what is projected"
        assert not torch.allclose(late[0], early[0], atol=0.01)
        assert torch.equal(early[1], late[1]), "afterwards nothing is projected"
        assert torch.equal(early[0], early[1])
    finally:
        lens.reset_hooks()
    assert not point.fwd_hooks


@pytest.mark.parametrize("form", ["per head", "joint", "centred"])
def test_folding_a_model_that_carries_an_adapter(pair_of, subspace_of, state_of, family, batch, tmp_path, form):
    """LoRA acts on k_proj and v_proj too: the map must go into base and adapter alike."""
    hf, subspace = copy.deepcopy(pair_of(family).hf), subspace_of(family, form)
    tokens, mask = batch
    adapter = make_adapter(hf, tmp_path / "adapter")
    state = state_of(hf)
    with torch.no_grad():
        merged = by_hand(merged_copy(hf, adapter), subspace, 0.7, tokens, mask)[mask.bool()]
        base = by_hand(hf, subspace, 0.7, tokens, mask)[mask.bool()]
        with adapted(hf, adapter) as tuned:
            within = state_of(tuned)
            with folded(tuned, subspace, 0.7):
                unmerged = twin_logits(tuned, tokens, mask)[mask.bool()]
            assert_same_bits(tuned, within)
    assert_same_bits(hf, state)
    assert (unmerged - merged).abs().max() < 1e-4 * merged.std()
    assert (merged - base).abs().max() > 0.1, "the adapter does nothing here"


def test_folding_none_leaves_the_model_alone(pair_of, state_of):
    hf = pair_of("llama").hf
    state = state_of(hf)
    with folded(hf, None) as model:
        assert model is hf
        assert_same_bits(hf, state)


@pytest.mark.parametrize(("family", "form"), [("llama", "per head"), ("qwen2", "joint"), ("qwen2", "centred")])
def test_a_folded_checkpoint_loads_in_plain_transformers(pair_of, subspace_of, state_of, tmp_path, family, form):
    pair, subspace = pair_of(family), subspace_of(family, form)
    state = state_of(pair.hf)
    directory = fold_to(pair.hf, subspace, tmp_path / "new" / "folded", tokenizer=pair.tokenizer)
    assert_same_bits(pair.hf, state)
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in directory.parent.iterdir()] == ["folded"], "something was left beside it"
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert type(plain) is type(pair.hf)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for example in EXAMPLES[:3]:
        ids = torch.tensor([pair.prompt_ids(example)])
        with folded(pair.hf, subspace):
            expected = pair.hf.generate(ids, **options)
        assert torch.equal(plain.generate(ids, **options), expected)


def test_a_centred_projection_goes_into_no_checkpoint_without_biases(pair_of, subspace_of, tmp_path):
    hf, subspace = pair_of("llama").hf, subspace_of("llama", "centred")
    with refused("LlamaForCausalLM", "1.k", "bias"):
        fold_to(hf, subspace, tmp_path / "folded")
    assert not list(tmp_path.iterdir())


def test_a_folded_checkpoint_overwrites_nothing(pair_of, subspace_of, tmp_path):
    hf, subspace = pair_of("llama").hf, subspace_of("llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("mine", "file"):
        with refused(name, "not empty"):
            fold_to(hf, subspace, tmp_path / name)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    (tmp_path / "empty").mkdir()
    assert (fold_to(hf, subspace, tmp_path / "empty") / "config.json").exists()


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "1", True, None])
def test_strengths_that_do_not_exist(pair_of, subspace_of, state_of, tmp_path, strength):
    pair, subspace = pair_of("llama"), subspace_of("llama")
    state, counts = state_of(pair.hf), hook_counts(pair.lens)
    for context in (projected(pair.lens, subspace, strength), folded(pair.hf, subspace, strength)):
        with refused(f"strength {strength!r}"), context:
            pass
    with refused(f"strength {strength!r}"):
        fold_to(pair.hf, subspace, tmp_path / "folded", strength)
    assert_same_bits(pair.hf, state)
    assert hook_counts(pair.lens) == counts
    assert not list(tmp_path.iterdir())
