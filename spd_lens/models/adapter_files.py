"""What an adapter's directory says, read with care: its base, its kind, its settings, and the layers that it names."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import nn

from spd_lens.errors import SPDError, one_line, shortened
from spd_lens.files import read_json, refuse_stand_in
from spd_lens.models import hub
from spd_lens.models.adapter_inventory import check_trained
from spd_lens.models.architectures import architecture, numbers_in

if TYPE_CHECKING:
    from peft import PeftConfig

TAKEN = frozenset(
    "ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS "
    "OFT OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA "
    "WAVEFT".split()
)
"""PEFT's kinds that change what layers of the twin compute, for each token by itself."""

_TOKENS = "it puts tokens of its own in front of the prompt, which shift all positions"
REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"), _TOKENS),
    "CARTRIDGE": "it puts a cache of its own in front of the prompt, which shifts all positions",
    "ADAPTION_PROMPT": "it replaces the attention, in which a projection then has no place",
    "LILY": "it mixes its matrices by the mean over a batch, so that completions depend on their company",
    "POLY": "it needs to be told a task with each prompt",
    "SHADOW": "it runs a second model beside the layers",
    "XLORA": "it mixes several adapters by what it reads",
}
"""PEFT's other kinds, and why they are refused."""

_REFUSED_SETTINGS = {
    "alora_invocation_tokens": "activated LoRA acts only behind these tokens",
    "arrow_config": "it chooses among other adapters by what it reads",
    "layer_replication": "it makes a model of another depth",
    "megatron_config": "it imports the code that megatron_core names",
    "monteclora_config": "it draws its weights at random",
    "sample_at_inference": "it draws its weights at random",
}

_LONGEST_CONFIG = 2**22
_TEXTS = ("base_model_name_or_path", "peft_version", "revision")
"""Settings that name no module and no option."""
_PLAIN = re.compile(r"[\w.\-]*")
"""Names in which nothing is a pattern but the dot, which also stands for itself."""
_ITERATIONS = re.compile(r".*_\d{3,}")
"""`pissa_niter_4` and the like, with a number of steps that takes for ever."""
_SIZES = re.compile(
    r"^(r|u|depth|.*(_r|rank|size|length|factor|terms|niter|block_num|_k))$|rank_|num_|frequency|block_"
)
"""Settings for which PEFT allocates memory or repeats a step."""
_REPEATED = re.compile("terms|niter|butterfly|depth")
_MOST_REPEATED = 64
_SMALL = 4096
_DEEPEST = 16


def check_adapter(adapter: str | Path) -> Path:
    """The adapter's directory: of a PEFT adapter that can be put on a twin, or of a checkpoint in safetensors.

    Raises:
        SPDError: it is neither; or PEFT's adapter is of a kind that is not taken, which the message names.
    """
    if not isinstance(adapter, (str, os.PathLike)):
        raise SPDError(f"an adapter is given as its directory, not as {adapter!r:.80}")
    directory = Path(adapter)
    if is_peft(directory):
        if not (directory / "adapter_model.safetensors").is_file():
            raise SPDError(f"{directory} has no adapter_model.safetensors (pickled adapters are not read)")
        _check_kind(directory, read_settings(directory))
        check_trained(directory)
    elif not (directory / "config.json").exists():
        raise SPDError(f"{directory} is not an adapter: it has neither adapter_config.json nor config.json")
    for file in (*directory.glob("*.json"), *directory.glob("*.safetensors")):
        refuse_stand_in(file)
    return directory


def adapter_digest(adapter: str | Path) -> str:
    """Names an adapter or checkpoint by its files' content, wherever the directory has moved to."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(check_adapter(adapter).glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def is_peft(directory: Path) -> bool:
    """Whether a directory is a PEFT adapter's, and not a whole checkpoint's."""
    return (directory / "adapter_config.json").exists()


def read_settings(directory: Path) -> dict[str, Any]:
    """What `adapter_config.json` holds; `SPDError` if that is no JSON object of a sane size."""
    path = directory / "adapter_config.json"
    try:
        if path.stat().st_size > _LONGEST_CONFIG:
            raise ValueError(f"it has more than {_LONGEST_CONFIG} bytes")
        settings = read_json(path)
    except (OSError, ValueError, SPDError) as error:
        raise SPDError(f"{directory} holds no readable adapter_config.json: {error!s:.300}") from error
    if not isinstance(settings, dict):
        raise SPDError(f"{directory} holds no readable adapter_config.json: it is a {type(settings).__name__}")
    for name, number in numbers_in(settings, kind=float):
        if not math.isfinite(number):
            raise SPDError(f"{name} of the adapter in {directory} is {number}; write a finite number")
    return settings


def layers_of_models(directory: Path) -> tuple[Path, list[Path]]:
    """The checkpoint under an adapter, and the adapters on it, which may be several, innermost first.

    Raises:
        SPDError: an adapter does not name its base as a model that there is, or is its own base.
    """
    stack: list[Path] = []
    while is_peft(directory):
        if directory.resolve() in [above.resolve() for above in stack] or len(stack) == _DEEPEST:
            raise SPDError(f"the adapter in {directory} is its own base, or has too many; name a model as its base")
        stack.append(directory)
        base = read_settings(directory).get("base_model_name_or_path")
        if not base:
            raise SPDError(f"the adapter in {directory} does not name its base model; load the base and pass adapter=")
        if not isinstance(base, str) or len(base) > 1000 or "\0" in base:
            raise SPDError(
                f"the adapter in {directory} names as its base {base!r:.80}, which is no model; load the base and pass "
                "adapter="
            )
        directory = hub.local_directory(base)
    return directory, stack[::-1]


def peft_config(directory: Path, modules: Iterable[str]) -> PeftConfig:
    """PEFT's own configuration, with layers named as the twin names them; `modules` are the names of the twin's.

    PEFT takes many of the names in the file for regular expressions, some of which would keep it busy for ever: what is
    no plain name is refused.

    Raises:
        SPDError: a setting is none that PEFT has for this kind, names layers by a pattern, or asks for more memory or
            work than the file's tensors are worth.
    """
    from peft import PeftConfig  # takes a second, which a model without an adapter does not wait for

    settings = read_settings(directory)
    _check_settings(directory, settings)
    names = list(modules)
    _check_sizes(directory, settings, most_tensors=32 * len(names) + 1024)
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # PEFT raises many types on settings that do not go together
        raise SPDError(f"the adapter in {directory} cannot be used: {one_line(error, 300)}") from error
    for field, value in vars(config).items():
        if field.endswith(("_modules", "_pattern", "_to_save")) and value:
            setattr(config, field, _spelled_out(f"{field} of the adapter in {directory}", field, value, names))
    return config


def _check_kind(directory: Path, settings: dict[str, Any]) -> None:
    kind = settings.get("peft_type")
    faults = {f"{kind} with {name}": why for name, why in _REFUSED_SETTINGS.items() if settings.get(name)}
    if not isinstance(kind, str) or kind not in TAKEN:
        unknown = "it is not known whether it leaves tokens and positions alone"
        faults = {f"{kind!r:.40}": REFUSED.get(str(kind), unknown)}
    for what, why in faults.items():
        raise SPDError(
            f"the adapter in {directory} is of the kind {what}, which is not taken: {why}; use it in PEFT itself, or "
            "train one that changes the layers, such as LoRA"
        )


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse what PEFT would not know or import, and names that it would take for patterns."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]])}
    for name, value in settings.items():
        if value and name not in known:  # PEFT would leave it out; what is off or empty changes nothing
            raise SPDError(
                f"the adapter in {directory} has {shortened(name)} = {shortened(repr(value))}, which PEFT "
                f"{peft.__version__} does not know; install the PEFT that wrote it, or take the setting out"
            )
        for text in _names_in(value) if name not in _TEXTS else ():
            if not _PLAIN.fullmatch(text):
                of = ", ".join(_adapted_names(directory)) if name == "target_modules" else ""
                raise SPDError(
                    f"{name} of the adapter in {directory} has {shortened(text, 80)!r}, a pattern; patterns are not "
                    f"run: write a list of names instead{f' (its tensors are of {of})' if of else ''}"
                )
            if _ITERATIONS.fullmatch(text) and name.startswith("init_"):
                raise SPDError(
                    f"{name} of the adapter in {directory} is {shortened(text)!r}; that takes too many steps"
                )


def _names_in(value: Any) -> Iterator[str]:
    """All texts in a setting, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from (key, *_names_in(part))
    elif isinstance(value, list):
        for part in value:
            yield from _names_in(part)


def _adapted_names(directory: Path) -> list[str]:
    """Last names of the layers that the file has tensors of, at most a dozen."""
    layers = (name.partition(".lora_")[0].rpartition(".")[2] for name in _shapes(directory) if ".lora_" in name)
    return sorted({layer for layer in layers if _PLAIN.fullmatch(layer)})[:12]


def _spelled_out(what: str, field: str, value: Any, names: list[str]) -> Any:
    """The same choice of modules by names that the model has; `SPDError` where the value names none at all."""
    if field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value, dict):
            raise SPDError(f"{what} is {value!r:.80}; it gives a number for each of some layers")
        masks = {key: mask for key, mask in value.items() if isinstance(mask, list)}  # of AdaLoRA
        keys = {key: number for key, number in value.items() if key not in masks}
        # PEFT takes a key for the end of a name, and the first that fits
        first = {name: next((key for key in keys if name == key or name.endswith(f".{key}")), None) for name in names}
        return masks | {name: keys[key] for name, key in first.items() if key is not None}
    if isinstance(value, (list, set)):
        parts = {end for name in names for end in accumulate(name.split(".")[::-1], lambda end, part: f"{part}.{end}")}
        if found := [part for part in value if part in parts]:
            return found
    first_of = next(iter(value)) if isinstance(value, (list, set)) else value
    if not isinstance(first_of, str):
        raise SPDError(f"{what} is {value!r:.80}, which names no modules")
    return first_of if value is first_of else [first_of]


def _shapes(directory: Path) -> dict[str, list[int]]:
    """The shape of every tensor of the adapter."""
    try:
        with safe_open(str(directory / "adapter_model.safetensors"), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise SPDError(
            f"the adapter in {directory} does not fit any model: adapter_model.safetensors cannot be read ({error}); "
            "make it again"
        ) from error


def first_adapted_layer(twin: nn.Module, adapter: str | Path) -> int:
    """The lowest block in which an adapter changes anything; 0 where its file does not say so.

    A LoRA acts where its file holds tensors, and nowhere else. Other kinds of adapters may make theirs from a seed, and
    a whole checkpoint may differ everywhere.

    Raises:
        SPDError: it is of a kind that is not taken, or is damaged.
    """
    directory = check_adapter(adapter)
    if not is_peft(directory) or read_settings(directory)["peft_type"] != "LORA":
        return 0
    block = re.compile(rf"\.{re.escape(architecture(twin).blocks)}\.(\d+)\.")
    places = [block.search(name) for name in _shapes(directory)]
    return min((0 if place is None else int(place[1]) for place in places), default=0)


def _check_sizes(directory: Path, settings: dict[str, Any], most_tensors: int) -> None:
    """Refuse sizes for which the file has too few numbers, and too many tensors, before memory is allocated."""
    shapes = _shapes(directory)
    if len(shapes) > most_tensors:
        raise SPDError(f"the adapter in {directory} does not fit the model: it has {len(shapes)} tensors")
    numbers = sum(map(math.prod, shapes.values()))
    counted = {name: value for name, value in settings.items() if _SIZES.search(name)}
    for name, size in numbers_in(counted):
        if size > (_MOST_REPEATED if _REPEATED.search(name) else max(numbers, _SMALL)):
            raise SPDError(
                f"the adapter in {directory} does not fit its own settings: {shortened(name)} is {size}, and its file "
                f"has {numbers} numbers in all"
            )
