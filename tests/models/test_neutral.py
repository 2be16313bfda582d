"""However the process and the models were left, every call gives the bits of a fresh process, and leaves it so."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from spd_lens.evaluation.choices import most_likely
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.generation.generate import generate
from spd_lens.models.hooks import named_parts
from spd_lens.models.load import load
from spd_lens.models.neutral import neutral
from spd_lens.models.pair import ModelPair
from spd_lens.runs.model_check import check_model, require_core
from spd_lens.runs.rounds import merged
from spd_lens.subspaces.extract import extract, token_gradients
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.projection import fold_to, folded, projected, projected_twin
from spd_lens.training.finetune import finetune
from tests.conftest import BACKENDS, build_llama, build_tokenizer, randomise
from tests.helpers import EXAMPLES, assert_same_bits, make_adapter, refused

SITES = {"layers": [1, 2], "kinds": ("k", "v")}
PROMPTS = ["Tom has 12 apples.", "7 * 3"]
SAMPLED = {"max_new_tokens": 6, "temperature": 2.0, "top_p": 1.0, "progress": False}


def build_gpt2() -> ModelPair:
    """A pair with dropout, which training mode would let loose."""
    tokenizer = build_tokenizer(chat=False)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=4, n_positions=256, n_ctx=256, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, dtype=torch.float32,
        architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    return ModelPair(randomise(GPT2LMHeadModel(config)), tokenizer, backend=BACKENDS[0], name="tiny")


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    built = build_gpt2()
    assert built.lens
    return built


@cache
def fixed() -> dict[str, Any]:
    """What calls need and no state may touch: made once, in a neutral process."""
    pair = build_gpt2()
    moments = extract(pair, EXAMPLES[:3], **SITES, shards=2, progress=False)
    saved, adapter = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    make_adapter(pair.hf, adapter, targets=["c_attn"])
    pair.hf.save_pretrained(saved)
    pair.tokenizer.save_pretrained(saved)
    corpus = generate(pair, PROMPTS, **SAMPLED)
    return {
        "subspace": moments.subspace(0.5),
        "corpus": corpus,
        "moments": moments,
        "saved": str(saved),
        "adapter": adapter,
    }


def of_moments(moments) -> Any:
    return moments.gradient, moments.activation, moments.loss_sum


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors"))}


CALLS: dict[str, Callable[[ModelPair, Path], Any]] = {
    "extract on the lens model": lambda pair, _: of_moments(extract(pair, EXAMPLES[:3], **SITES, progress=False)),
    "extract on the twin": lambda pair, _: of_moments(
        extract(pair, EXAMPLES[:3], **SITES, engine="twin", progress=False)
    ),
    "token_gradients": lambda pair, _: [
        (rows.gradient, rows.activation, rows.loss)
        for rows in token_gradients(pair, EXAMPLES[:3], **SITES, engine="twin", progress=False)
    ],
    "generate on the twin": lambda pair, _: [r.completion_ids for r in generate(pair, PROMPTS, **SAMPLED)],
    "generate under a projection": lambda pair, _: [
        r.completion_ids for r in generate(pair, PROMPTS, subspace=fixed()["subspace"], **SAMPLED)
    ],
    "generate on the lens model": lambda pair, _: [
        r.completion_ids for r in generate(pair, PROMPTS, engine="lens", **SAMPLED)
    ],
    "teacher_forced": lambda pair, _: teacher_forced(
        pair, EXAMPLES[:2], [Policy("base"), Policy("projected", fixed()["subspace"])], progress=False
    ),
    "most_likely": lambda pair, _: most_likely(
        pair, EXAMPLES[4:5], {"planet": "ABCD"}, Policy("projected", fixed()["subspace"]), progress=False
    ),
    "evaluate": lambda pair, _: [
        (item.completion, item.aligned_loss, item.kl, item.score)
        for item in evaluate(pair, "synthetic-math", 2, max_new_tokens=4, progress=False).items
    ],
    "finetune": lambda pair, out: files(
        finetune(pair, fixed()["corpus"], out=out / "a", epochs=1, lr=1e-2, progress=False)
    ),
    "finetune in full": lambda pair, out: files(
        finetune(pair, fixed()["corpus"], out=out / "a", epochs=1, lr=1e-2, method="full", progress=False)
    ),
    "check": lambda pair, _: (pair.check().logits, pair.check_logits(pair.hf)),
    "check_model": lambda pair, _: [check.says for check in check_model(pair)],
    "require_core": lambda pair, _: require_core(pair, SITES["layers"], SITES["kinds"]),
    "sync": lambda pair, _: pair.sync(to="lens").logits,
    "generate with an adapter": lambda pair, _: [
        r.completion_ids for r in generate(pair, PROMPTS, adapter=fixed()["adapter"], **SAMPLED)
    ],
    "sync an adapter": lambda pair, _: (
        pair.sync(to="lens", adapter=fixed()["adapter"]),
        pair.check_logits(pair.lens),
        pair.sync(to="lens").kl,
    ),
    "merge an adapter": lambda pair, _: dict(merged(pair, fixed()["adapter"]).hf.named_parameters()),
    "load": lambda pair, _: (lambda new: (new.check_logits(new.lens), new.check_logits(new.hf)))(
        load(fixed()["saved"], dtype="float32", device="cpu")
    ),
    "a pair of a model": lambda pair, _: of_a_copy(pair).check().logits,
    "fold_to": lambda pair, out: files(fold_to(pair.hf, fixed()["subspace"], out / "f")),
    "to_lora": lambda pair, out: files(fixed()["subspace"].to_lora(pair.hf, out / "l")),
    "folded": lambda pair, _: under(folded(pair.hf, fixed()["subspace"]), pair, pair.hf),
    "projected": lambda pair, _: under(projected(pair.lens, fixed()["subspace"]), pair, pair.lens),
    "projected_twin": lambda pair, _: under(projected_twin(pair.hf, fixed()["subspace"]), pair, pair.hf),
    "subspaces": lambda pair, _: subspaces(pair),
}


def of_a_copy(pair: ModelPair) -> ModelPair:
    with torch.inference_mode(False):
        own = copy.deepcopy(pair.hf)
    return ModelPair(own, pair.tokenizer, backend="bridge")


def under(context: Any, pair: ModelPair, model: torch.nn.Module) -> torch.Tensor:
    with context:
        return pair.check_logits(model)


def subspaces(pair: ModelPair) -> Any:
    moments = fixed()["moments"]
    one, other = moments.halves()[0].subspace(0.25), moments.subspace(0.25).random_like(0)
    centred = moments.subspace(0.25, center=True)
    composed = (one | other).bases, (one & other).bases, (~one).bases
    return one.bases, centred.offset, composed, centred.affine(centred.sites[0], 0.5)


def attribute(where: Any, name: str, value: Any) -> contextlib.AbstractContextManager[None]:
    own = getattr(where, name)
    return undone(lambda: setattr(where, name, value), lambda: setattr(where, name, own))


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def undone(do: Callable[[], Any], undo: Callable[[], Any]) -> Iterator[None]:
    do()
    try:
        yield
    finally:
        undo()


def modes(*settings: tuple[Callable[..., Any], Any, Any]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for setter, value, usual in settings:
        stack.enter_context(undone(lambda s=setter, v=value: s(v), lambda s=setter, u=usual: s(u)))
    return stack


@contextlib.contextmanager
def trained(pair: ModelPair) -> Iterator[None]:
    """As the user's own training leaves it: training mode, but for one layer; weights with gradients."""
    pair.hf.train().requires_grad_(True)
    pair.hf.transformer.h[1].eval()
    pair.lens.train()
    pair.hf(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    pair.hf.lm_head.requires_grad_(False)
    try:
        yield
    finally:
        pair.hf.eval().requires_grad_(False)
        pair.lens.eval()
        pair.hf.zero_grad()


@contextlib.contextmanager
def checkpointed(pair: ModelPair) -> Iterator[None]:
    pair.hf.train()
    pair.hf.activation_checkpointing_enable({"use_reentrant": True})  # which passes no gradient to frozen inputs
    try:
        yield
    finally:
        pair.hf.activation_checkpointing_disable()
        pair.hf.eval()


@contextlib.contextmanager
def compiled(pair: ModelPair) -> Iterator[None]:
    """In place: a layer, the whole, and `forward` alone. The backend would change every number."""

    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: [
            x + 1 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in graph(*args)
        ]

    pair.hf.transformer.h[2].compile(backend=wrong)
    pair.hf.compile(backend=wrong)
    mlp = pair.hf.transformer.h[1].mlp
    mlp.forward = torch.compile(mlp.forward, backend=wrong)
    try:
        yield
    finally:
        pair.hf._compiled_call_impl = pair.hf.transformer.h[2]._compiled_call_impl = None
        del mlp.forward
        torch.compiler.reset()


@contextlib.contextmanager
def prepared(pair: ModelPair) -> Iterator[None]:
    """As a training of one's own in mixed precision leaves it: `forward` runs under autocast."""
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(pair.hf, evaluation_mode=True)
    assert "forward" in vars(pair.hf)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(pair.hf).pop(name, None)
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def looked_at(pair: ModelPair) -> Iterator[None]:
    seen: list[Any] = []
    block = pair.hf.transformer.h[1]
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(output)),
        block.mlp.register_forward_pre_hook(lambda module, args: args),
        block.mlp.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs)),
    ]
    pair.lens.add_hook("blocks.1.attn.hook_v", lambda x, hook: seen.append(x))
    pair.lens.add_hook("blocks.2.attn.hook_k", lambda x, hook: x, is_permanent=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        pair.lens.reset_hooks(including_permanent=True)


STATES: dict[str, Callable[[ModelPair], contextlib.AbstractContextManager[Any]]] = {
    "training mode and gradients": trained,
    "gradient checkpointing": checkpointed,
    "inputs that require gradients": lambda pair: undone(
        pair.hf.enable_input_require_grads, pair.hf.disable_input_require_grads
    ),
    "compiled in place": compiled,
    "hooks that look": looked_at,
    "accelerate's wrapper": prepared,
    "autocast": lambda _: torch.autocast("cpu", dtype=torch.bfloat16),
    "gradients off": lambda _: modes((torch.set_grad_enabled, False, True)),
    "inference mode": lambda _: torch.inference_mode(),
    "default dtype float64": lambda _: modes((torch.set_default_dtype, torch.float64, torch.float32)),
    "default dtype bfloat16": lambda _: modes((torch.set_default_dtype, torch.bfloat16, torch.float32)),
    "default device": lambda _: modes((torch.set_default_device, "meta", None)),
    "device context": lambda _: torch.device("meta"),
    "products in bfloat16": lambda _: modes((torch.set_float32_matmul_precision, "medium", "highest")),
    "one backend's precision": lambda _: attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "deterministic": lambda _: modes((torch.use_deterministic_algorithms, True, False)),
    "one attention kernel": lambda _: sdpa_kernel(SDPBackend.MATH),
    "anomalies": lambda _: torch.autograd.detect_anomaly(check_nan=False),
    "accelerate": lambda _: environment(
        ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4", ACCELERATE_USE_FSDP="true",
        FSDP_CPU_RAM_EFFICIENT_LOADING="true", ACCELERATE_DYNAMO_BACKEND="EAGER", ACCELERATE_TORCH_DEVICE="meta",
        WANDB_PROJECT="mine",
    ),
    "a launcher": lambda _: environment(LOCAL_RANK="1", RANK="1", WORLD_SIZE="2", OMPI_COMM_WORLD_SIZE="2"),
    "the default cache off": lambda pair: attribute(pair.hf.config, "use_cache", False),
    "another cache": lambda pair: attribute(
        pair.hf, "generation_config", GenerationConfig(cache_implementation="quantized")
    ),
}  # fmt: skip

TOGETHER = {
    "one half of the states": [
        "inputs that require gradients", "hooks that look", "training mode and gradients", "autocast",
        "gradients off", "default dtype float64", "default device", "products in bfloat16", "deterministic",
        "one attention kernel", "accelerate",
    ],
    "the other half": [
        "accelerate's wrapper", "gradient checkpointing", "compiled in place", "inference mode",
        "default dtype bfloat16", "device context",
        "one backend's precision", "anomalies", "a launcher", "the default cache off", "another cache",
    ],
}  # fmt: skip
"""All calls are made in these at once, and a few in each state by itself."""
FEW = ("extract on the twin", "check", "finetune")


def bits(value: Any) -> Any:
    """Something that is equal only to the same bits."""
    if isinstance(value, torch.Tensor):
        assert not value.is_inference()
        return str(value.dtype), str(value.device), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {str(key): bits(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(one) for one in value]
    return repr(value)


@cache
def plainly(call: str, tmp: Path) -> Any:
    pair = build_gpt2()
    assert pair.lens
    return bits(CALLS[call](pair, tmp))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plainly")


def everything(pair: ModelPair) -> dict[str, Any]:
    """What a user may have set, of process and models."""
    seen: dict[str, Any] = {
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "defaults": (torch.get_default_dtype(), str(torch.get_default_device()), torch.get_autocast_dtype("cpu")),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": [b.matmul.fp32_precision for b in (torch.backends.mkldnn, torch.backends.cuda)],
        "attention": (_cur_sdpa_kernel_backends(), torch._C._get_sdp_priority_order()),
        "random": (torch.random.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())),
        "environment": dict(os.environ),
        "accelerate": [dict(s._shared_state) for s in (PartialState, AcceleratorState, GradientState)],
        "config": pair.hf.config.to_dict(),
    }
    for which, model in zip(("twin", "lens"), pair.models, strict=True):
        for name, module in named_parts(model).items():
            fields = {field: value for field, value in vars(module).items() if field.endswith("_hooks")}
            tables = [dict(table) for table in fields.values() if isinstance(table, dict)]
            flags = (module.training, vars(module).get("gradient_checkpointing"), id(module._compiled_call_impl))
            seen[f"{which} {name}"] = (tables, flags, id(vars(module).get("forward")))
        for name, weight in model.named_parameters():
            seen[f"{which} {name}, flags"] = (id(weight), weight.requires_grad, id(weight.grad))
    return seen


def assert_nothing_leaks(
    pair: ModelPair, states: list[str], call: str, out: Path, scratch: Path, state_of: Callable[..., Any]
) -> None:
    expected = plainly(call, scratch / call.replace(" ", "-"))
    weights = [state_of(model) for model in pair.models]
    with contextlib.ExitStack() as stack:
        for state in states:
            stack.enter_context(STATES[state](pair))
        before = everything(pair)
        found = CALLS[call](pair, out)
        after = everything(pair)
    assert bits(found) == expected
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed
    for model, own in zip(pair.models, weights, strict=True):
        assert_same_bits(model, own)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("states", TOGETHER)
def test_each_call_gives_its_bits_and_leaves_what_it_found(pair, states, call, tmp_path, scratch, state_of):
    if (states, call) == ("the other half", "projected_twin"):
        with refused("the model itself is compiled", "set_stance"):
            assert_nothing_leaks(pair, TOGETHER[states], call, tmp_path, scratch, state_of)
        return
    assert_nothing_leaks(pair, TOGETHER[states], call, tmp_path, scratch, state_of)


@pytest.mark.parametrize("call", FEW)
@pytest.mark.parametrize("state", STATES)
def test_each_state_by_itself(pair, state, call, tmp_path, scratch, state_of):
    assert_nothing_leaks(pair, [state], call, tmp_path, scratch, state_of)


def test_the_halves_hold_every_state():
    assert {state for half in TOGETHER.values() for state in half} == STATES.keys()


@pytest.mark.parametrize("state", ["training mode and gradients", "autocast", "products in bfloat16"])
def test_a_state_would_change_the_numbers(pair, state):
    # in the open: what the calls are kept from
    tokens = torch.arange(40, 70)[None]
    with torch.no_grad():
        expected = pair.hf(input_ids=tokens).logits
    with STATES[state](pair), torch.no_grad():
        found = pair.hf(input_ids=tokens).logits
        with neutral(pair.hf):
            kept = pair.hf(input_ids=tokens).logits
    if state != "products in bfloat16" or torch.cpu.get_capabilities().get("avx512_bf16"):
        assert not torch.equal(found.float(), expected)
    assert torch.equal(kept, expected)


def test_training_recomputes_only_what_it_was_asked_to(pair, tmp_path):
    passes: list[int] = []
    handle = pair.hf.transformer.h[1].mlp.register_forward_hook(lambda *_: passes.append(1))
    try:
        CALLS["finetune"](pair, tmp_path / "plain")
        plain = len(passes)
        with checkpointed(pair):
            CALLS["finetune"](pair, tmp_path / "checkpointed")
    finally:
        handle.remove()
    assert len(passes) == 2 * plain > 0


def test_who_takes_token_gradients_is_not_inside(pair):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in token_gradients(pair, EXAMPLES[:2], **SITES, progress=False):
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            assert all(not gradient.requires_grad for gradient in rows.gradient.values())
            pair.hf.train()  # and may do as they like
    pair.hf.eval()


class _Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Doubling, lambda: FlopCounterMode(display=False), FakeTensorMode])
@pytest.mark.parametrize("call", ["extract on the twin", "generate on the twin", "check", "load"])
def test_another_mode_is_refused(pair, mode, call, tmp_path):
    fixed()
    with mode(), refused("Mode" if mode is not _Doubling else "_Doubling", "close it"):
        CALLS[call](pair, tmp_path)
    assert CALLS["check"](pair, tmp_path)


def on_every_module(hf: Any) -> Any:
    return torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if module is hf.transformer.h[1].mlp else None
    )


CHANGING: dict[str, Callable[[Any], Any]] = {
    "an output": lambda hf: hf.transformer.h[1].mlp.register_forward_hook(lambda module, args, output: output * 2),
    "an output in place": lambda hf: hf.transformer.h[1].mlp.register_forward_hook(lambda m, a, out: out.mul_(2)),
    "its input for an output": lambda hf: hf.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: args[0]),
    "through all modules": on_every_module,
    "an input": lambda hf: hf.transformer.h[2].mlp.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "keywords": lambda hf: hf.transformer.h[2].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True
    ),
}


@pytest.mark.parametrize("what", CHANGING)
@pytest.mark.parametrize("call", ["extract on the twin", "generate on the twin", "teacher_forced", "finetune", "check"])
def test_a_hook_that_changes_what_passes_is_refused_by_its_place(pair, what, call, tmp_path):
    handle = CHANGING[what](pair.hf)
    try:
        with refused("every module" if what == "through all modules" else "transformer.h.", "hook", "remove()"):
            CALLS[call](pair, tmp_path)
    finally:
        handle.remove()
    assert CALLS["check"](pair, tmp_path)


@pytest.mark.parametrize("call", ["extract on the lens model", "generate on the lens model", "check", "sync"])
def test_a_hook_that_was_left_on_the_lens_model_is_refused(pair, call, tmp_path):
    pair.lens.add_hook("blocks.1.attn.hook_v", lambda x, hook: x * 0, is_permanent=True)
    try:
        with refused("blocks.1.", "hook_", "reset_hooks"):
            CALLS[call](pair, tmp_path)
    finally:
        pair.lens.reset_hooks(including_permanent=True)


def test_this_librarys_own_contexts_may_stay_open(pair):
    subspace = fixed()["subspace"]
    inside = extract(pair, EXAMPLES[:2], **SITES, progress=False)
    with projected(pair.lens, subspace), projected_twin(pair.hf, subspace):
        projection = [
            extract(pair, EXAMPLES[:2], **SITES, engine=engine, progress=False) for engine in ("lens", "twin")
        ]
    for moments in projection:
        site = moments.sites[-1]
        assert not torch.equal(moments.gradient[site], inside.gradient[site])


def test_a_compiled_model_is_the_model(pair):
    wrapped = torch.compile(copy.deepcopy(pair.hf), backend="eager")
    mine = ModelPair(wrapped, pair.tokenizer, backend="bridge")
    assert mine.hf is wrapped._orig_mod
    assert bits(of_moments(extract(mine, EXAMPLES[:3], **SITES, engine="twin", progress=False))) == bits(
        of_moments(extract(pair, EXAMPLES[:3], **SITES, engine="twin", progress=False))
    )
    torch.compiler.reset()


def test_hooks_on_a_compiled_lens_model_are_refused(pair):
    wrapped = torch.compile(pair.lens, backend="eager")
    with refused("compiled"), projected(wrapped, fixed()["subspace"]):
        pass
    torch.compiler.reset()


def test_a_layer_behind_torch_compile_is_refused(pair):
    hf = copy.deepcopy(pair.hf)
    hf.transformer.h[1] = torch.compile(hf.transformer.h[1], backend="eager")
    with refused("transformer.h.1", "layer.compile()"):
        ModelPair(hf, pair.tokenizer)
    torch.compiler.reset()


def test_weights_made_in_inference_mode_are_refused(pair):
    with torch.inference_mode():
        hf = build_llama(build_tokenizer(chat=False))
    with refused("inference_mode", "outside"):
        ModelPair(hf, pair.tokenizer)


@pytest.mark.parametrize("thing", ["gpt2", None, torch.nn.Linear(2, 2)])
def test_what_is_no_pair_is_refused(thing):
    with refused("ModelPair", "spd_lens.load"):
        extract(thing, EXAMPLES)


def test_a_wrapped_model_is_refused(pair):
    with refused("DataParallel", ".module"):
        ModelPair(torch.nn.DataParallel(pair.hf), pair.tokenizer)


@pytest.mark.parametrize("call", ["finetune in full", "fold_to"])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6, "do_sample": False}, {"cache_implementation": "static", "use_cache": False}]
)
def test_a_model_that_cannot_be_saved_is_refused_before_the_work(pair, call, settings, tmp_path):
    fixed()
    with (
        attribute(pair.hf, "generation_config", GenerationConfig(**settings)),
        refused("could not be saved", next(iter(settings)), "generation_config.json"),
    ):
        CALLS[call](pair, tmp_path)
    assert not any(tmp_path.iterdir())
