"""The sha256 of an artefact's content: of tensors with their header, and of JSON, whatever its spaces and order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spd_lens.errors import DamagedFile

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = "sha256"
"""The key of a digest in the metadata of a safetensors file, and in a JSON file whose outermost value is a table."""


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The sha256 over the metadata (without `sha256`), and the name, dtype, shape and bytes of each tensor by name."""
    import torch  # here, so that settings are read without it

    digest = hashlib.sha256(canonical({key: text for key, text in metadata.items() if key != DIGEST}))
    for name, tensor in sorted(tensors.items()):
        about = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(canonical(about))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of: keys in order, no spaces, all in ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def signed(value: Any) -> str:
    """JSON text of a value. A table gets the digest of all else that is in it, as its last key."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    if isinstance(value, dict):
        content = json.loads(text)  # keys that are texts, as a reader will find them
        content.pop(DIGEST, None)
        text = json.dumps({**content, DIGEST: _of(content)}, indent=1, ensure_ascii=False)
    return text + "\n"


def unsigned(value: Any) -> Any:
    """A JSON value without its digest, if it has one; `DamagedFile` if it is not that of the value."""
    if type(value) is not dict or not value:
        return value
    key = DIGEST if DIGEST in value else next(reversed(value))  # whose name may be what is damaged
    noted = value[key]
    if key != DIGEST and not (isinstance(noted, str) and len(noted) == 64):
        return value
    content = {name: part for name, part in value.items() if name != key}
    if _of(content) == noted:
        return content
    if key != DIGEST:
        return value
    raise DamagedFile(
        "it has changed since it was written (its sha256 is another); restore it, or take the key sha256 out if "
        "the change is yours"
    )


def _of(content: Any) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()
