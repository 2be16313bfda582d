"""Every kind of adapter that PEFT has: taken, and then what PEFT says it is, or refused by its name."""

import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file

import spd_lens as spd
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.models.adapter_files import REFUSED, TAKEN, adapter_digest
from spd_lens.models.adapters import adapted, merged_copy
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.projection import fold_to, folded, projected_twin
from tests.helpers import ALL_KINDS, EXAMPLES, assert_same_bits, refused, save_adapter

TOKENS = torch.tensor([[0, 20, 31, 42, 53, 64, 75, 86], [0, 86, 20, 75, 31, 64, 42, 53]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

SETTINGS = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "v_proj", "o_proj"], "feedforward_modules": ["o_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [20, 31], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}
"""What a kind needs on a model as small as this."""

VARIANTS = {
    "all biases": {"bias": "all"},
    "biases of its layers": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "EVA": {"init_lora_weights": "eva"},
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True},
    "rsLoRA": {"use_rslora": True},
    "biases of LoRA": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "trained tokens": {"trainable_token_indices": [20, 31]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj", "norm", "lm_head"]},
    "whole attention": {"target_modules": ["up_proj"], "modules_to_save": ["self_attn", "embed_tokens"]},
    "whole layer": {"target_modules": ["lm_head"], "modules_to_save": ["layers.1"]},
    "parameters": {"target_modules": [], "target_parameters": ["k_proj.weight", "mlp.up_proj.weight"]},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "k_proj": 1},
        "alpha_pattern": {"layers.2.self_attn.v_proj": 7},
    },
    "some layers": {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "all layers": {"target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def pair(pair_of):
    return pair_of("qwen2")


@pytest.fixture(scope="module")
def subspace(pair):
    return extract(pair, EXAMPLES, engine="twin", kinds=ALL_KINDS, progress=False).subspace(rank=4, center=True)


@pytest.fixture
def hf(pair, state_of):
    """The twin, and afterwards the proof that nothing of it is another."""
    twin = pair.hf
    state = state_of(twin)
    modules = [(name, id(module), dict(vars(module))) for name, module in twin.named_modules()]
    configs = [copy.deepcopy(vars(config)) for config in (twin.config, twin.generation_config)]
    yield twin
    assert_same_bits(twin, state)
    assert [(name, id(module), vars(module)) for name, module in twin.named_modules()] == modules
    assert [vars(config) for config in (twin.config, twin.generation_config)] == configs


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def far(one, two):
    return ((one - two).abs().max() / two.std()).item()


def check(hf, directory, subspace):
    """What must hold for whatever is taken: PEFT's own logits, folded as under hooks, merged as unmerged."""
    torch.manual_seed(0)  # some kinds draw what they start from
    own = logits(PeftModel.from_pretrained(copy.deepcopy(hf), directory).eval())
    assert far(own, logits(hf)) > 0.05, "the adapter does nothing here"
    with adapted(hf, directory) as tuned:
        assert torch.equal(logits(tuned), own)
        assert torch.equal(logits(hf), own), "it is the twin itself that runs while it generates"
        for strength in (1.0, 0.4):
            with projected_twin(hf, subspace, strength):
                hooked = logits(hf)
            with folded(tuned, subspace, strength):
                assert far(logits(tuned), hooked) < 1e-4
        assert far(hooked, own) > 0.1, "the projection does nothing here"
        assert torch.equal(logits(hf), own)
    return own


def test_each_kind_of_peft_is_decided_on():
    """A new kind in a later PEFT: does it leave tokens and positions alone? Then it is taken, else refused."""
    assert {kind.value for kind in PeftType} <= TAKEN | REFUSED.keys()
    assert not TAKEN & REFUSED.keys()


def test_adalora_that_was_trained_to_its_end_has_fewer_ranks_in_some_layers(hf, subspace, tmp_path):
    settings = {"init_r": 4, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 3, "target_modules": ATTENTION}
    tuned = peft.get_peft_model(copy.deepcopy(hf), peft.AdaLoraConfig(**settings, task_type="CAUSAL_LM"))
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    for step in range(8):
        tuned(input_ids=TOKENS, labels=TOKENS).loss.backward()
        tuned.base_model.update_and_allocate(step)
        tuned.zero_grad()
    tuned.save_pretrained(tmp_path)
    masks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert not all(all(mask) for mask in masks.values())
    own = check(hf, tmp_path, subspace)
    assert far(own, logits(tuned.eval())) < 1e-4
    assert far(logits(merged_copy(hf, tmp_path)), own) < 1e-3


@pytest.mark.parametrize("kind", sorted(TAKEN & set(PeftType.__members__)))
def test_a_kind_that_is_taken_is_what_peft_says(hf, kind, subspace, tmp_path):
    if kind == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT's AdaMSS clusters with scikit-learn")
    settings = {"target_modules": ATTENTION, "task_type": "CAUSAL_LM", **SETTINGS.get(kind, {})}
    save_adapter(hf, tmp_path, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**settings))
    own = check(hf, tmp_path, subspace)
    if kind == "BEFT":  # biases on layers that have none
        with refused(tmp_path, kind, "cannot be merged", "bias"):
            merged_copy(hf, tmp_path)
    else:
        assert far(logits(merged_copy(hf, tmp_path)), own) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_in_all_its_forms_is_what_peft_says(hf, variant, subspace, tmp_path):
    save_adapter(hf, tmp_path, LoraConfig(r=4, **{"target_modules": ATTENTION, **VARIANTS[variant]}))
    own = check(hf, tmp_path, subspace)
    assert far(logits(merged_copy(hf, tmp_path)), own) < 1e-3


def test_embeddings_in_the_file_are_in_force_while_the_adapter_is_on(hf, subspace, tmp_path):
    """So different that they are another model's by their looks; the subspace is still of the model below."""
    save_adapter(hf, tmp_path, LoraConfig(r=4, target_modules=ATTENTION), embeddings=1.0)
    before = hf.get_input_embeddings().weight
    with adapted(hf, tmp_path):
        assert not torch.equal(hf.get_input_embeddings().weight, before)
    own = check(hf, tmp_path, subspace)
    assert far(logits(merged_copy(hf, tmp_path)), own) < 1e-3


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_the_base_is_measured_alike_before_and_after(pair, subspace, tmp_path, std):
    """Policies one after the other, on several batches each."""
    adapter = tmp_path / "adapter"
    save_adapter(
        pair.hf, adapter, LoraConfig(r=4, target_modules=ATTENTION, bias="all", init_lora_weights="pissa"), std=std
    )
    policies = [
        Policy("base"),
        Policy("tuned", adapter=adapter),
        Policy("both", subspace, adapter=adapter),
        Policy("again"),
    ]
    forced = teacher_forced(pair, EXAMPLES, policies, batch_tokens=64, progress=False)
    assert forced["base"] == forced["again"]
    assert all(item.kl == 0 for item in forced["again"])
    assert max(item.kl for item in forced["both"]) > 0.01
    options = {"max_new_tokens": 6, "temperature": 0, "progress": False}
    plain, tuned, again = (
        [record.completion_ids for record in spd.generate(pair, ["Tom has 12 apples.", "7 * 3"], adapter=on, **options)]
        for on in (None, adapter, None)
    )
    assert plain == again
    assert std == 0 or plain != tuned


def test_completions_under_a_projection_are_those_of_the_hooked_model(pair, subspace, tmp_path):
    """DoRA cannot be folded; generation in slots runs through its hooks, step by step, as whole passes do."""
    from tests.helpers import greedy

    save_adapter(pair.hf, tmp_path, LoraConfig(r=4, target_modules=ATTENTION, use_dora=True))
    prompts = ["Tom has 12 apples.", "def add(a, b):", "7 * 3"]
    corpus = spd.generate(
        pair, prompts, adapter=tmp_path, subspace=subspace, max_new_tokens=8, temperature=0, progress=False
    )
    with adapted(pair.hf, tmp_path) as tuned, projected_twin(tuned, subspace):
        for record in corpus:
            whole = greedy(lambda tokens: tuned(input_ids=tokens).logits, record.prompt_ids, len(record.completion_ids))
            assert list(record.completion_ids) == whole


def written(directory, **settings):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"prompt_embeddings": torch.zeros(4, 32)}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_kind_that_is_refused_is_refused_by_name_wherever_an_adapter_goes(pair, hf, kind, tmp_path):
    adapter = written(tmp_path / "adapter", peft_type=kind, base_model_name_or_path=pair.name, num_virtual_tokens=4)
    words = (adapter, kind, "not taken", "use it in PEFT itself")
    entrances = [
        lambda: adapted(hf, adapter).__enter__(),
        lambda: merged_copy(hf, adapter),
        lambda: adapter_digest(adapter),
        lambda: spd.load(str(adapter), device="cpu"),
        lambda: pair.sync(to="lens", adapter=adapter),
        lambda: spd.generate(pair, ["7 * 3"], adapter=adapter, max_new_tokens=4, progress=False),
        lambda: teacher_forced(pair, EXAMPLES[:1], [Policy("tuned", adapter=adapter)], progress=False),
        lambda: evaluate(pair, "synthetic-math", 1, adapter=adapter, max_new_tokens=2, progress=False),
    ]
    for entrance in entrances:
        with refused(*words):
            entrance()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"peft_type": "LORA", "alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"peft_type": "LORA", "layer_replication": [[0, 4]] * 2000}, "layer_replication"),
        ({"peft_type": "LORA", "arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"peft_type": "LORA", "monteclora_config": {"num_samples": 2}}, "monteclora_config"),
        ({"peft_type": "PVERA", "sample_at_inference": True}, "sample_at_inference"),
        ({"peft_type": "SOMETHING_OF_NEXT_YEAR"}, "'SOMETHING_OF_NEXT_YEAR'"),
        ({"peft_type": ["LORA"]}, "['LORA']"),
        ({}, "None"),
    ],
)
def test_a_setting_that_makes_another_kind_is_refused_by_name(hf, settings, word, tmp_path):
    adapter = written(tmp_path / "adapter", **settings)
    for entrance in (lambda: adapted(hf, adapter).__enter__(), lambda: merged_copy(hf, adapter)):
        with refused(adapter, word, "not taken"):
            entrance()


def test_a_model_with_an_adapter_on_is_no_pair_and_no_checkpoint(pair, subspace, tmp_path):
    save_adapter(pair.hf, tmp_path / "adapter", LoraConfig(r=4, target_modules=ATTENTION))
    with adapted(pair.hf, tmp_path / "adapter") as tuned:
        for model in (tuned, pair.hf):
            with refused("carries a PEFT adapter"):
                fold_to(model, subspace, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    prompted = peft.get_peft_model(
        copy.deepcopy(pair.hf), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with refused("carries a PEFT adapter"):
        spd.ModelPair(prompted, pair.tokenizer)


def test_a_merge_that_loses_something_is_noticed(pair, tmp_path, monkeypatch):
    """A PEFT that merges only some of the layers."""
    save_adapter(pair.hf, tmp_path, LoraConfig(r=4, target_modules=ATTENTION))
    merge = peft.tuners.lora.Linear.merge
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "merge", lambda layer, **options: layer.out_features == 32 and merge(layer, **options)
    )
    with refused(tmp_path, "LORA", "cannot be merged", "off by"):
        merged_copy(pair.hf, tmp_path)
