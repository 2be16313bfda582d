"""`adapted`: an adapter on the twin and off again, without a trace, whatever happens."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spd_lens.models.adapters import adapted, merged_copy
from tests.helpers import assert_same_bits, make_adapter, refused

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86]])


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def twin(pair_of, family):
    """The twin, and afterwards the proof that it is what it was."""
    hf = pair_of(family).hf
    state = {name: value.clone() for name, value in hf.state_dict().items()}
    modules, attributes = [(name, id(module)) for name, module in hf.named_modules()], set(vars(hf))
    before = logits(hf)
    yield hf
    assert_same_bits(hf, state)
    assert [(name, id(module)) for name, module in hf.named_modules()] == modules
    assert set(vars(hf)) == attributes
    assert not any(parameter.requires_grad for parameter in hf.parameters())
    assert not hf.training
    assert torch.equal(logits(hf), before)


@pytest.fixture
def adapter(twin, tmp_path):
    return make_adapter(twin, tmp_path / "adapter")


def test_the_adapter_is_on_inside_and_off_outside(twin, adapter, tiny_llama_dir, tiny_qwen2_dir, family):
    fresh = AutoModelForCausalLM.from_pretrained({"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}[family])
    expected = logits(PeftModel.from_pretrained(fresh, adapter).eval())
    plain = logits(twin)
    with adapted(twin, adapter) as tuned:
        inside = logits(tuned)
        assert not tuned.training
    assert torch.equal(inside, expected)
    assert (inside - plain).abs().max() > 0.1


def test_the_adapter_comes_off_after_an_error_and_an_early_return(twin, adapter):
    with pytest.raises(ZeroDivisionError), adapted(twin, adapter):
        1 / 0  # noqa: B018 (raises, which is the point)

    def leaves_early():
        with adapted(twin, adapter) as tuned:
            return logits(tuned)

    assert torch.equal(leaves_early(), leaves_early())


def test_weights_are_frozen_afterwards_whatever_was_done_inside(twin, adapter):
    with adapted(twin, adapter) as tuned:
        tuned.requires_grad_(True)


def test_adapters_can_be_put_on_again_and_again(twin, adapter, tmp_path):
    other = make_adapter(twin, tmp_path / "other", seed=1)
    results = []
    for directory in (adapter, other, adapter):
        with adapted(twin, directory) as tuned:
            results.append(logits(tuned))
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1], atol=0.1)


def test_merging_in_a_copy_says_the_same(twin, adapter):
    merged = merged_copy(twin, adapter)
    with adapted(twin, adapter) as tuned:
        assert torch.allclose(logits(merged), logits(tuned), atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.equal(logits(merged_copy(twin, None)), logits(twin))


def test_merging_happens_in_float32(pair_of, tmp_path):
    """An adapter smaller than bfloat16's steps is whole in the copy."""
    hf = pair_of("llama", "auto", "bfloat16").hf
    merged = merged_copy(hf, make_adapter(hf, tmp_path / "adapter", std=0.01))
    assert merged.dtype == torch.float32
    change = merged.model.layers[1].self_attn.k_proj.weight - hf.model.layers[1].self_attn.k_proj.weight.float()
    assert 0 < change.abs().max() < 0.005


def test_no_adapter_is_the_twin_itself(twin):
    with adapted(twin, None) as model:
        assert model is twin


def test_a_whole_checkpoint_stands_in_for_an_adapter(twin, tmp_path):
    tuned = merged_copy(twin, None)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    with adapted(twin, tmp_path / "tuned") as model:
        assert torch.equal(logits(model), logits(tuned))
    with pytest.raises(ZeroDivisionError), adapted(twin, tmp_path / "tuned"):
        1 / 0  # noqa: B018 (raises, which is the point)


def test_a_checkpoint_of_another_model_is_refused(twin, tmp_path):
    tuned = merged_copy(twin, None)
    tuned.save_pretrained(tmp_path / "tuned")
    path = tmp_path / "tuned" / "model.safetensors"
    state = load_file(path)
    key = "model.layers.3.mlp.up_proj.weight"
    save_file(state | {key: torch.zeros(3, 32)}, path)
    with refused("tuned", key, "(3, 32)"), adapted(twin, tmp_path / "tuned"):
        pass
    save_file({name: value for name, value in state.items() if name != key}, path)
    with refused("tuned", "lacks", key), adapted(twin, tmp_path / "tuned"):
        pass
    deeper = {name.replace("layers.3", "layers.4"): value.clone() for name, value in state.items()}
    save_file(deeper | state, path)
    with refused("tuned", "model.layers.4.", "no place"), adapted(twin, tmp_path / "tuned"):
        pass
    save_file(state | {"model.rotary_emb.inv_freq": torch.ones(4)}, path)  # as earlier versions of transformers did
    with adapted(twin, tmp_path / "tuned") as tuned_twin:
        assert torch.equal(logits(tuned_twin), logits(twin))
    save_file({"layers.0.attention.wq.weight": torch.ones(4)}, path.with_name("consolidated.safetensors"))
    with adapted(twin, tmp_path / "tuned"):
        pass
    path.write_bytes(b"nonsense")
    with refused("tuned", "cannot be read"), adapted(twin, tmp_path / "tuned"):
        pass


def rewrite(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_an_adapter_of_a_wider_model_is_refused(twin, adapter):
    rewrite(adapter, lambda state: {name: torch.cat([value, value], dim=1) for name, value in state.items()})
    with refused("adapter", type(twin).__name__, "size mismatch"), adapted(twin, adapter):
        pass


def test_an_adapter_of_a_deeper_model_is_refused(twin, adapter):
    """PEFT itself would take the layers that exist and warn about nothing."""
    rewrite(
        adapter, lambda state: state | {name.replace("layers.0", "layers.9"): v.clone() for name, v in state.items()}
    )
    with refused("adapter", "layers.9", "no counterpart"), adapted(twin, adapter):
        pass


def test_an_adapter_of_a_shallower_model_is_refused(twin, adapter):
    rewrite(adapter, lambda state: {name: value for name, value in state.items() if "layers.3" not in name})
    with refused("adapter", "layers.3", "no counterpart"), adapted(twin, adapter):
        pass


def test_an_adapter_for_layers_that_do_not_exist_is_refused(twin, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["c_attn"]}))
    with refused("adapter", "c_attn"), adapted(twin, adapter):
        pass


def test_a_damaged_adapter_is_refused(twin, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with refused("adapter", "does not fit"), adapted(twin, adapter):
        pass
    weights.unlink()
    with refused("adapter_model.safetensors"), adapted(twin, adapter):
        pass
    with refused("nowhere", "not an adapter"), adapted(twin, adapter.parent / "nowhere"):
        pass
