"""Adapters and full checkpoints on the twin: put on as PEFT does, taken off without a trace, merged in float32."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, one_line
from spd_lens.models.adapter_files import check_adapter, is_peft, peft_config
from spd_lens.models.device_map import refuse_spread
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.neutral import neutral, random_kept
from spd_lens.models.parity import Parity
from spd_lens.models.torch_private import lazy_copy
from spd_lens.models.twin import in_float32, run_twin
from spd_lens.models.untouched import untouched

if TYPE_CHECKING:
    from peft import PeftModel

_COMPUTED = ("inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Ends of names of buffers that checkpoints of earlier versions of transformers hold: rotary frequencies and causal
masks."""


_ON_ONE = "load the model without device_map, or merge the adapter on a machine that holds it and load the result"


@contextlib.contextmanager
def adapted(twin: PreTrainedModel, adapter: str | Path | None) -> Iterator[nn.Module]:
    """The twin with an adapter on, unmerged; off again always.

    The adapter is put on copies of all that the twin holds, see `untouched`: whatever its kind writes to, the twin's
    own bits, modules and configs are never touched, which a digest proves each time.

    Args:
        twin: The transformers model.
        adapter: A PEFT directory, or the directory of a whole fine-tuned checkpoint of the same architecture. None
            yields the twin itself.

    Raises:
        SPDError: it is of a kind that is not taken, is damaged, or does not fit the twin, or the twin is on several
            devices.
    """
    if adapter is None:
        yield twin
        return
    directory = check_adapter(adapter)
    refuse_spread(twin, "an adapter", _ON_ONE)
    base = Fingerprint.of(twin)
    with untouched(twin):
        with neutral():
            changed = _put_on(twin, directory) if is_peft(directory) else _load_weights(twin, directory)
        if is_peft(directory):
            base.remember(twin)  # it may have brought embeddings of its own, and is still an adapter of this model
        yield changed


def merged_copy(twin: PreTrainedModel, adapter: str | Path | None) -> PreTrainedModel:
    """A float32 copy of the twin with the adapter merged in; the twin is left alone.

    Raises:
        SPDError: as `adapted`; or the adapter cannot be written into the weights, which the logits of the two tell.
    """
    directory = None if adapter is None else check_adapter(adapter)
    refuse_spread(twin, "a merged copy", _ON_ONE)
    with neutral(twin):
        wide = in_float32(twin)
        if directory is None:
            return wide
        return _merged(wide, directory) if is_peft(directory) else _load_weights(wide, directory)


def _put_on(twin: PreTrainedModel, directory: Path) -> PeftModel:
    """PEFT's model around the twin, holding every tensor of the file."""
    from peft import PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict

    config = peft_config(directory, [name for name, _ in twin.named_modules() if name])
    own = {id(tensor) for tensor in (*twin.parameters(), *twin.buffers())}
    try:
        with random_kept(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # a fault below
            warnings.filterwarnings("ignore", "(?s).*LoRA tensor.*lora_B.bias")  # PEFT takes its LoRA bias for a shard
            torch.manual_seed(0)  # PEFT draws even what it overwrites, and of some kinds it stays: the same each time
            # files are read on the CPU, as safetensors knows few devices; PEFT copies to where the model is
            wrapped = PeftModel.from_pretrained(twin, str(directory), config=config, torch_device="cpu")
            if config.peft_type == PeftType.ADALORA:
                config.rank_pattern = None  # it has been followed: what it leaves out is not there any more
            # again, for what PEFT tells here alone: it takes what it finds, and warns at most
            mapping = getattr(twin, "_checkpoint_conversion_mapping", {})
            stored = load_peft_weights(str(directory), device="cpu", key_mapping=mapping)
            fault = _fault(wrapped, stored, set_peft_model_state_dict(wrapped, stored), own)
    except Exception as error:  # peft, torch and safetensors raise many types on a damaged or foreign adapter
        reason = one_line(error, 300)
        fault = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        raise SPDError(f"the adapter in {directory} does not fit {type(twin).__name__}: {fault}") from error
    if fault is not None:
        raise SPDError(f"the adapter in {directory} does not fit {type(twin).__name__}: {fault}")
    return wrapped.eval()


def _fault(wrapped: PeftModel, stored: dict[str, Tensor], result: Any, own: set[int]) -> str | None:
    """What tensor of the file has no place in the model or no effect there, or the other way round; None if all fit.

    `result` is what PEFT returned for loading it, `own` are the model's own tensors. A file may hold some of those:
    PEFT saves embeddings, and biases that were trained.
    """
    from peft import get_peft_model_state_dict

    there = wrapped.state_dict(keep_vars=True)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    embeddings = get_peft_model_state_dict(wrapped, save_embedding_layers=True).keys()
    base = {name for name in stored if name in there and id(there[name]) in own}
    unknown = (base - expected.keys() - embeddings) | {_unnamed(name) for name in result.unexpected_keys}
    if unknown:
        return f"{min(unknown)} has no counterpart in the model"
    # by name or by memory: some kinds have one name in files and another in the model, and older files a third
    names = {_unnamed(name) for name in result.missing_keys}
    places = {there[name].data_ptr() for name in result.missing_keys if id(there[name]) not in own}
    lacking = expected.keys() - stored.keys()
    missing = {name for name in lacking if name in names or expected[name].data_ptr() in places}
    if missing:
        return f"{min(missing)} has no counterpart in the file"
    for name, tensor in stored.items():
        if not tensor.float().isfinite().all():
            return f"it holds numbers that are not finite, in {name}; train it again"
        if name in base and not torch.equal(there[name], tensor.to(there[name])):
            return f"it holds {name} apart from another matrix, and the model ties the two"
    return None


def _unnamed(key: str) -> str:
    """A tensor's name in the file, where the adapter has no name of its own."""
    return key.replace(".default", "")


def _merged(wide: PreTrainedModel, directory: Path) -> PreTrainedModel:
    inner, outer = wide.get_input_embeddings(), wide.get_output_embeddings()
    tied = outer is not None and outer.weight is inner.weight
    wrapped = _put_on(wide, directory)
    kind = getattr(wrapped.peft_type, "value", wrapped.peft_type)
    apart = _probe_logits(wrapped)
    if tied:  # what is merged into one of them must not reach the other
        outer.weight = nn.Parameter(lazy_copy(outer.weight), requires_grad=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings")  # which are seen to here
            merged: Any = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # each kind has its own way to say that it cannot
        reason = one_line(error)
        raise SPDError(
            f"the adapter in {directory} ({kind}) cannot be merged ({reason}); load its base and pass adapter="
        ) from error
    if tied:
        inner, outer = merged.get_input_embeddings(), merged.get_output_embeddings()
        merged.config.tie_word_embeddings = torch.equal(inner.weight, outer.weight)
        if merged.config.tie_word_embeddings:
            outer.weight = inner.weight
    gap = Parity.between(apart, _probe_logits(merged))
    if not gap.within(torch.float32):
        raise SPDError(
            f"the adapter in {directory} ({kind}) cannot be merged: logits would be off by {gap.logits:.2g} of their "
            "spread; load its base and pass adapter="
        )
    return merged


@torch.no_grad()
def _probe_logits(model: Any) -> Float[Tensor, "row pos d_vocab"]:
    """On tokens from all over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(64) * 7919 % rows).view(2, 32).to(model.device)
    return run_twin(model, tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.double()


def _load_weights(twin: PreTrainedModel, directory: Path) -> PreTrainedModel:
    state: dict[str, torch.Tensor] = {}
    try:
        # a folder may hold the weights a second time, under the names that another program gives them
        for file in sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors")):
            state |= load_file(file)
    except (SafetensorError, OSError) as error:
        raise SPDError(f"the checkpoint in {directory} cannot be read ({error}); make it again") from error
    for name, parameter in twin.named_parameters():
        if name not in state or state[name].shape != parameter.shape:
            found = f"has {name} as {tuple(state[name].shape)}" if name in state else f"lacks {name}"
            raise SPDError(f"the checkpoint in {directory} does not fit {type(twin).__name__}: it {found}")
    unexpected = twin.load_state_dict(state, strict=False).unexpected_keys
    unknown = [name for name in unexpected if not name.endswith(_COMPUTED)]
    tied = dict(twin.named_parameters(remove_duplicate=False))
    apart = [name for name in state.keys() & tied.keys() if not torch.equal(tied[name], state[name].to(tied[name]))]
    if unknown or apart:
        raise SPDError(
            f"the checkpoint in {directory} does not fit {type(twin).__name__}: it has {min(unknown or apart)}, "
            f"{'for which there is no place' if unknown else 'apart from another matrix, and the model ties the two'}"
        )
    return twin
