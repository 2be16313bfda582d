"""A projection as a LoRA adapter: the folded model's logits and tokens, by PEFT alone and beside other adapters."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file

from spd_lens.models.adapters import merged_copy
from spd_lens.models.fingerprint import Fingerprint, weights_digest
from spd_lens.models.load import load
from spd_lens.sites import Site
from spd_lens.subspaces.bases import random_basis
from spd_lens.subspaces.lora import VLLM_RANKS, vllm_note
from spd_lens.subspaces.projection import fold_to, folded
from spd_lens.subspaces.subspace import Subspace
from tests.conftest import randomise
from tests.helpers import assert_same_bits, make_adapter, refused
from tests.models.zoo import build_twin

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86], [0, 14, 15, 92, 65, 35, 89, 79]])


def drawn(hf, ranks, *, joint=False, centred=False, seed=0):
    """Random directions of `hf`: `ranks` gives for each site one rank, or one per block."""
    shape, generator = Fingerprint.of(hf), torch.Generator().manual_seed(seed)
    blocks, offset = {}, {}
    for site, rank in ranks.items():
        n_heads, d_head = shape.heads_at(site)
        n, width = (1, n_heads * d_head) if joint else (n_heads, d_head)
        each = rank if isinstance(rank, tuple) else (rank,) * n
        blocks[site] = [random_basis(width, r, generator) for r in each]
        offset[site] = 0.3 * torch.randn(n, width, generator=generator).double()
    return Subspace.from_blocks(blocks, fingerprint=shape, offset=offset if centred else {})


KV = {Site(1, "k"): 4, Site(1, "v"): 4, Site(3, "k"): 4, Site(3, "v"): 4}
UNEVEN = {Site(0, "k"): 8, Site(1, "k"): 2, Site(1, "v"): 5, Site(1, "q"): 3, Site(2, "z"): 6, Site(3, "v"): 8}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def put_on(hf, directory, name="default"):
    """A copy of the model with the adapter on, by PEFT alone."""
    return PeftModel.from_pretrained(copy.deepcopy(hf), str(directory), adapter_name=name).eval()


def tokens_of(model, n=8):
    return model.generate(input_ids=TOKENS, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=2)


ARCHITECTURES = (
    "llama", "qwen2", "gpt2", "gpt_neox", "phi3", "opt", "falcon, one KV head", "falcon, all heads", "falcon, groups"
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")  # of the centred form, without biases
@pytest.mark.parametrize("form", ["per head", "joint", "uneven", "centred"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapter_is_the_folded_model(state_of, tmp_path, name, form):
    """Separate layers, fused ones of each layout, transposed ones; with biases and without."""
    hf = build_twin(name)
    strength = 0.7 if form == "uneven" else 1.0
    subspace = drawn(hf, UNEVEN if form == "uneven" else KV, joint=form == "joint", centred=form == "centred")
    state = state_of(hf)
    directory = subspace.to_lora(hf, tmp_path / "new" / "adapter", strength=strength)
    assert_same_bits(hf, state)
    files = ["adapter_config.json", "adapter_model.safetensors", "projection.json"]
    assert sorted(path.name for path in directory.iterdir()) == files
    assert [p.name for p in directory.parent.iterdir()] == ["adapter"], "something was left beside it"
    model = put_on(hf, directory)
    with folded(hf, subspace, strength):
        expected, greedy = logits(hf), tokens_of(hf)
    scale = expected.std()
    assert (expected - logits(hf)).abs().max() > 0.1 * scale, "the projection does nothing here"
    assert (logits(model) - expected).abs().max() < 1e-4 * scale
    assert torch.equal(tokens_of(model), greedy)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(directory / "adapter_model.safetensors").values())


def test_the_weights_are_the_formula_in_float64(tmp_path):
    """`B A = -(I - P) W` and `b = -(I - P) b`, written out per head for the layers of Qwen2."""
    hf = build_twin("qwen2")
    subspace = drawn(hf, KV)
    tensors = load_file(subspace.to_lora(hf, tmp_path / "a", strength=0.25) / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 0.25
    seen = set()
    for site in subspace.sites:
        name = f"model.layers.{site.layer}.self_attn.{site.kind}_proj"
        layer, stored = hf.get_submodule(name), f"base_model.model.{name}"
        left_out = torch.eye(16).double() - torch.block_diag(*subspace.projector(site))
        a, b, bias = (tensors[f"{stored}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
        assert torch.allclose((b.double() @ a.double()), -left_out @ layer.weight.double(), atol=1e-6)
        assert torch.allclose(bias.double(), -left_out @ layer.bias.double(), atol=1e-6)
        assert torch.allclose(b.T @ b, torch.eye(8), atol=1e-6), "n_kv (d_head - r) orthonormal directions"
        seen.add(name)
    assert set(config["target_modules"]) == seen == set(config["target_modules"])
    assert len(tensors) == 3 * len(seen)


def test_ranks_that_differ_are_each_layers_own(tmp_path):
    hf = build_twin("llama")
    ranks = {Site(0, "k"): 8, Site(1, "k"): (2, 4), Site(1, "v"): 5, Site(2, "z"): 6}
    directory = drawn(hf, ranks).to_lora(hf, tmp_path / "adapter", strength=0.5)
    config = json.loads((directory / "adapter_config.json").read_text())
    k, v, z = (f"model.layers.{name}" for name in ("1.self_attn.k_proj", "1.self_attn.v_proj", "2.self_attn.o_proj"))
    assert config["target_modules"] == [k, v, z], "block 0 keeps all of its keys"
    assert {name: config["rank_pattern"].get(name, config["r"]) for name in (k, v, z)} == {k: 10, v: 6, z: 8}
    assert {name: config["alpha_pattern"].get(name, config["lora_alpha"]) for name in (k, v, z)} == {k: 5, v: 3, z: 4}
    assert config["lora_bias"] is False and config["fan_in_fan_out"] is False
    gpt2 = build_twin("gpt2")
    config = json.loads((drawn(gpt2, KV).to_lora(gpt2, tmp_path / "b") / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and config["r"] == 4 * (8 - 4) * 2, "k and v of one fused layer"


def test_biases_of_zero_need_no_lora_bias(tmp_path):
    """vLLM takes no LoRA bias, so that there should be one only where it does something."""
    hf = build_twin("qwen2")
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    directory = drawn(hf, KV).to_lora(hf, tmp_path / "adapter")
    assert json.loads((directory / "adapter_config.json").read_text())["lora_bias"] is False


def test_the_file_says_what_it_is_and_is_the_same_each_time(tmp_path):
    hf = build_twin("llama")
    subspace = drawn(hf, KV)
    one, two = (subspace.to_lora(hf, tmp_path / name, strength=0.5) for name in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    origin = json.loads((one / "projection.json").read_text())
    assert origin == {"subspace": subspace.digest(), "model": "", "weights": weights_digest(hf), "strength": 0.5}


def test_of_a_bfloat16_model_the_adapter_is_computed_from_the_weights_as_they_are(tmp_path):
    hf = build_twin("llama")
    rough = copy.deepcopy(hf).to(torch.bfloat16)
    subspace = drawn(hf, KV)
    of_rough = load_file(subspace.to_lora(rough, tmp_path / "a") / "adapter_model.safetensors")
    of_wide = load_file(subspace.to_lora(rough.float(), tmp_path / "b") / "adapter_model.safetensors")
    assert all(torch.equal(tensor, of_wide[name]) for name, tensor in of_rough.items())


def test_one_model_switches_between_the_base_and_two_capabilities(tmp_path):
    """The toggle in one process: PEFT's `set_adapter` and `disable_adapter`."""
    hf = build_twin("llama")
    subspaces = {name: drawn(hf, KV, seed=seed) for seed, name in enumerate(("math", "code"))}
    expected = {"base": logits(hf)}
    for name, subspace in subspaces.items():
        subspace.to_lora(hf, tmp_path / name)
        with folded(hf, subspace):
            expected[name] = logits(hf)
    model = put_on(hf, tmp_path / "math", "math")
    model.load_adapter(str(tmp_path / "code"), "code")
    for name in ("code", "math", "code"):
        model.set_adapter(name)
        assert torch.allclose(logits(model), expected[name], atol=1e-4 * expected[name].std().item())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["base"])
    assert (expected["math"] - expected["code"]).abs().max() > 0.1


class TestBesideATrainedAdapter:
    """`set_adapter(["math-subspace", "spd-lora"])`, against weights that are put together by hand in float64."""

    @pytest.fixture
    def hf(self):
        return build_twin("llama")

    @pytest.fixture
    def trained(self, hf, tmp_path):
        return make_adapter(hf, tmp_path / "trained")

    @staticmethod
    def by_hand(hf, trained, subspace, *, project_trained):
        """`P W + B A`, or `P (W + B A)`."""
        made = copy.deepcopy(hf)
        stored = load_file(trained / "adapter_model.safetensors")
        with torch.no_grad():
            for name, module in made.named_modules():
                key = f"base_model.model.{name}"
                if f"{key}.lora_A.weight" not in stored:
                    continue
                a, b = (stored[f"{key}.lora_{part}.weight"].double() for part in "AB")
                added = 2.0 * b @ a  # lora_alpha is twice the rank
                kept = torch.eye(module.weight.shape[0]).double()
                for site in subspace.sites:
                    if name == f"model.layers.{site.layer}.self_attn.{site.kind}_proj":
                        kept = torch.block_diag(*subspace.projector(site))
                weight = module.weight.double()
                weight = kept @ (weight + added) if project_trained else kept @ weight + added
                module.weight.copy_(weight)
        return made

    @staticmethod
    def both(hf, projection, trained):
        model = put_on(hf, projection, "math-subspace")
        model.load_adapter(str(trained), "spd-lora")
        model.base_model.set_adapter(["math-subspace", "spd-lora"])
        return model

    def test_the_changes_add_up_and_what_was_trained_is_not_projected(self, hf, trained, tmp_path):
        subspace = drawn(hf, KV)
        projection = subspace.to_lora(hf, tmp_path / "projection")
        model = self.both(hf, projection, trained)
        expected = logits(self.by_hand(hf, trained, subspace, project_trained=False))
        projected_too = logits(self.by_hand(hf, trained, subspace, project_trained=True))
        assert (logits(model) - expected).abs().max() < 1e-4 * expected.std()
        assert (projected_too - expected).abs().max() > 0.1 * expected.std(), "the two cannot be told apart here"

    def test_of_the_tuned_model_it_is_the_projection_of_all(self, hf, trained, tmp_path):
        """On the merged checkpoint, beside the trained adapter, and as one adapter that PEFT makes of the two."""
        subspace = drawn(hf, KV)
        tuned = merged_copy(hf, trained)
        projection = subspace.to_lora(tuned, tmp_path / "projection")
        expected = logits(self.by_hand(hf, trained, subspace, project_trained=True))
        model = self.both(hf, projection, trained)
        close = 1e-4 * expected.std()
        assert (logits(put_on(tuned, projection)) - expected).abs().max() < close
        assert (logits(model) - expected).abs().max() < close
        model.add_weighted_adapter(["math-subspace", "spd-lora"], [1.0, 1.0], "one", combination_type="cat")
        model.save_pretrained(tmp_path / "saved", selected_adapters=["one"])
        assert (logits(put_on(hf, tmp_path / "saved" / "one")) - expected).abs().max() < close


def test_the_library_takes_the_adapter_for_what_it_is(pair_of, tmp_path):
    """`load` merges it, so that evaluation, generation and the lens model run on it as on any adapter."""
    hf = pair_of("qwen2").hf
    subspace = drawn(hf, KV)
    directory = subspace.to_lora(hf, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)  # PEFT takes a bias, which has one axis, for a broken matrix
        pair = load(str(directory), dtype="float32", device="cpu")
    with folded(hf, subspace):
        expected = logits(hf)
    assert (logits(pair.hf) - expected).abs().max() < 1e-4 * expected.std()


class TestWhatVLLMTakes:
    @pytest.mark.parametrize(("r", "room"), [(1, 1), (96, 128), (512, 512)])
    def test_the_least_room_that_is_enough(self, tmp_path, r, room):
        LoraConfig(r=8, rank_pattern={"k_proj": r} if r > 8 else {}, target_modules=["k_proj"]).save_pretrained(
            tmp_path
        )
        assert vllm_note(tmp_path).endswith(f"--max-lora-rank {room if r > 8 else 8}")

    def test_above_its_largest_rank_a_checkpoint_is_the_way(self, tmp_path):
        LoraConfig(r=VLLM_RANKS[-1] + 1, target_modules=["k_proj"]).save_pretrained(tmp_path)
        note = vllm_note(tmp_path)
        assert "its rank 513 is above 512" in note and "checkpoint" in note

    def test_with_biases_a_checkpoint_is_the_way(self, tmp_path):
        hf = build_twin("qwen2")
        note = vllm_note(drawn(hf, KV).to_lora(hf, tmp_path / "adapter"))
        assert "it has a LoRA bias" in note and "checkpoint" in note


class TestRefused:
    def test_a_directory_with_something_in_it(self, tmp_path):
        hf = build_twin("llama")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        with refused("mine", "not empty"):
            drawn(hf, KV).to_lora(hf, tmp_path / "mine")
        assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "1", True, None])
    def test_strengths_that_do_not_exist(self, tmp_path, strength):
        hf = build_twin("llama")
        with refused(f"strength {strength!r}"):
            drawn(hf, KV).to_lora(hf, tmp_path / "adapter", strength=strength)
        assert not list(tmp_path.iterdir())

    def test_another_model(self, tmp_path):
        hf, other = build_twin("llama"), randomise(build_twin("llama"), seed=5)
        with refused("the subspace"):
            drawn(other, KV).to_lora(hf, tmp_path / "adapter")

    @pytest.mark.parametrize(("kind", "centred"), [("resid", False), ("z", True)])
    def test_sites_that_no_layer_writes(self, tmp_path, kind, centred):
        hf = build_twin("llama")
        with refused(f"1.{kind}", "an adapter cannot hold it"):
            drawn(hf, {Site(1, kind): 3}, centred=centred).to_lora(hf, tmp_path / "adapter")
        with refused(f"1.{kind}", "a checkpoint cannot hold it"):
            fold_to(hf, drawn(hf, {Site(1, kind): 3}, centred=centred), tmp_path / "folded")
        assert not list(tmp_path.iterdir())

    def test_a_subspace_that_keeps_everything(self, tmp_path):
        hf = build_twin("llama")
        with refused("keeps every direction"):
            drawn(hf, {Site(1, "k"): 8}).to_lora(hf, tmp_path / "adapter")

    def test_a_model_that_carries_an_adapter(self, tmp_path):
        hf = build_twin("llama")
        subspace = drawn(hf, KV)
        model = get_peft_model(hf, LoraConfig(target_modules=["k_proj"]))
        with refused("carries a PEFT adapter"):
            subspace.to_lora(model, tmp_path / "adapter")
