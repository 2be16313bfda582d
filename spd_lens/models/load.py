"""`load`: a model pair from a name: hub, directory, GGUF file or the embedded default."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.models import hub
from spd_lens.models.backends import choose_backends
from spd_lens.models.checkpoint import read_checkpoint
from spd_lens.models.devices import resolve_device, resolve_dtype
from spd_lens.models.launchers import single_process
from spd_lens.models.neutral import neutral
from spd_lens.models.pair import ModelPair
from spd_lens.models.tokenizer import read_tokenizer
from spd_lens.settings import DEFAULT_MODEL


@neutral()
@single_process()
def load(
    model: str = DEFAULT_MODEL,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | int | Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
    prompt_format: str = "auto",
    add_special_tokens: bool = True,
    span_rule: str = "overlap",
    system: str | None = None,
    enable_thinking: bool | None = None,
    prompt_date: str | date | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> ModelPair:
    """Load a model as lens and twin.

    Args:
        model: Hub name, local directory (safetensors, one GGUF file, or a PEFT adapter, which is merged into its base
            in float32), or a `.gguf` file. GGUF and bitsandbytes weights are de-quantised.
        backend: `"hooked"` (HookedTransformer, transformer-lens 3.9), `"bridge"` (TransformerBridge) or `"auto"`: the
            first of them that takes the model and says what the twin says.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: bfloat16 where the hardware multiplies it, else
            float32. Exact identities (hook = fold, batched = single) are promised in float32.
        device: `"auto"` (CUDA if there is one), `"cpu"`, `"cuda"`, `"cuda:1"`, ...
        device_map: For a model that one device cannot hold: which part of it is where, as transformers takes it.
            `"auto"` (GPUs first, then memory, then the disk), `"balanced"`, `"sequential"`, or a device for each part:
            `{"model.embed_tokens": 0, "model.layers": "disk", ...}`. Gradients, generation, evaluation and folding then
            work on the twin; a lens model, adapters and training need one device. None: all on `device`.
        offload_folder: Where weights for `"disk"` are written that the checkpoint holds in another form; the others are
            read from the checkpoint itself, which must stay where it is.
        prompt_format: `"chat"`, `"raw"` (the prompt and a line break), `"verbatim"` (the prompt as it is) or `"auto"`
            (chat where the tokenizer has a template, else raw).
        add_special_tokens: Whether raw and verbatim prompts begin with what the tokenizer adds before any text, such as
            BOS.
        span_rule: `"overlap"`: a token counts if it overlaps a span. `"inside"`: only if it lies wholly inside one.
        system: System message of the chat format; None leaves the template's own.
        enable_thinking: Whether the prompts of a thinking model (such as Qwen3) leave room for thoughts; None leaves
            the chat template's own default.
        prompt_date: The day, as YYYY-MM-DD, that a chat template shows which shows today's date. None: today, or the
            day of a corpus or run that is continued.
        revision: Branch, tag or commit on the hub.
        gguf_file: The file to load, where a directory or hub repository has several GGUF files.
        trust_remote_code: Allow code from the model's repository to run. Off unless you ask for it.

    Raises:
        SPDError: the model does not exist or cannot be converted, the device or dtype is not available, or the
            tokenizer has no chat template that takes `system`, `enable_thinking` or `prompt_date`, or has one where
            `add_special_tokens` would do nothing. With a `device_map`: a device beside it, a map that names no device
            for a part, an embedding that is offloaded, an adapter, or weights that are quantised.
    """
    placed = _placed(device, device_map, offload_folder)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    choose_backends(backend)  # a wrong backend is refused before the model is read
    directory = hub.local_directory(model, revision=revision, gguf_file=gguf_file)
    twin = read_checkpoint(directory, kind, trust_remote_code, **placed)
    tokenizer = read_tokenizer(directory, trust_remote_code)
    # adapters name their base by this: what the user can load again, not where a cache happens to lie
    name = str(Path(model).resolve()) if Path(model).exists() else model
    twin.config._name_or_path = twin.name_or_path = name
    return ModelPair(
        twin if placed else twin.to(place), tokenizer, name=name, backend=backend, prompt_format=prompt_format,
        system=system, enable_thinking=enable_thinking, prompt_date=prompt_date,
        add_special_tokens=add_special_tokens, span_rule=span_rule,
    )  # fmt: skip


def _placed(
    device: str, device_map: str | int | Mapping[str, str | int] | None, offload_folder: str | Path | None
) -> dict[str, Any]:
    """What transformers is told of where the parts of a model belong; nothing without a `device_map`."""
    if device_map is None:
        if offload_folder is not None:
            raise SPDError(f"offload_folder={str(offload_folder)!r} does nothing without device_map; leave it out")
        return {}
    if device != "auto":
        raise SPDError(f"device {device!r} and device_map {device_map!r} both say where the model is; leave one out")
    given = dict(device_map) if isinstance(device_map, Mapping) else device_map
    return {"device_map": given} | ({} if offload_folder is None else {"offload_folder": str(offload_folder)})
