"""A model's tokenizer, alone: enough to see how text becomes tokens, without reading any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from spd_lens.errors import SPDError
from spd_lens.models import adapters, hub


def load_tokenizer(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer that `spd_lens.load(model)` would use.

    Raises:
        SPDError: there is no such model, or it has no tokenizer that can be read.
    """
    return read_tokenizer(hub.local_directory(model, revision=revision), trust_remote_code)


def read_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's directory; an adapter without one of its own has that of its base."""
    has_own = (directory / "tokenizer_config.json").exists() or (directory / "tokenizer.json").exists()
    if not has_own and (directory / "adapter_config.json").exists():
        return read_tokenizer(hub.local_directory(adapters.adapter_base(directory)), trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise many types on a damaged or missing tokenizer
        reason = " ".join(str(error).split())[:300]
        raise SPDError(f"the tokenizer in {directory} cannot be loaded: {reason}") from error
