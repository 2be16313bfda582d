"""A model's tokenizer, alone: enough to see how text becomes tokens, without reading any weights.

Everything that becomes tokens goes through `tokenised`, which knows what a tokenizer adds to a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from spd_lens.errors import SPDError, TooLong, one_line, shortened
from spd_lens.models import hub
from spd_lens.models.adapter_files import layers_of_models


def load_tokenizer(model: str) -> Any:
    """The tokenizer that `spd_lens.load(model)` would use.

    Raises:
        SPDError: there is no such model, or it has no tokenizer that can be read.
    """
    return read_tokenizer(hub.local_directory(model))


def read_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's directory; an adapter without one of its own has that of its base."""
    if not _has_tokenizer(directory):
        checkpoint, adapters = layers_of_models(directory)
        directory = next((adapter for adapter in reversed(adapters) if _has_tokenizer(adapter)), checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise many types on a damaged or missing tokenizer
        raise SPDError(f"the tokenizer in {directory} cannot be loaded: {one_line(error, 300)}") from error
    if not isinstance(most := tokenizer.model_max_length, int | float):
        raise SPDError(
            f"the tokenizer in {directory} says model_max_length = {shortened(repr(most))}, which is no number; get a "
            "complete copy"
        )
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normaliser is not None and _growth(json.loads(normaliser.__getstate__())) > _MOST_GROWTH:
        raise SPDError(
            f"the tokenizer in {directory} may make more than {_MOST_GROWTH} characters of each one, which would take "
            "all memory; use another tokenizer"
        )
    return tokenizer


def _growth(normaliser: Any) -> int:
    """How many characters a normaliser's replacements may make of one, one after the other."""
    parts = normaliser.values() if isinstance(normaliser, dict) else normaliser if isinstance(normaliser, list) else ()
    own = str(normaliser.get("content") or normaliser.get("prepend") or "") if isinstance(normaliser, dict) else ""
    return math.prod(map(_growth, parts)) * max(len(own), 1)


def _has_tokenizer(directory: Path) -> bool:
    return (directory / "tokenizer_config.json").exists() or (directory / "tokenizer.json").exists()


class Tokens(NamedTuple):
    """A text's tokens, and the characters `[low, high)` that each one holds."""

    ids: list[int]
    offsets: list[tuple[int, int]]


_MOST_GROWTH = 10_000
"""Characters that a normaliser may make of one; those of published tokenizers make a handful."""
_CHARACTERS = 16
"""Characters per token of the context that are tokenised before it is known that a text may fit."""
_MARGIN = 64
"""Tokens that a text may have more when it is cut than it has in the whole."""


def tokenised(tokenizer: Any, text: str, *, specials: bool = True, most: int | None = None) -> Tokens:
    """A text's tokens as a model gets them that is to go on with it.

    With what the tokenizer puts before a text (BOS), and without what it puts behind (EOS, with `add_eos_token`; SEP):
    a completion begins right behind the text.

    Args:
        tokenizer: A fast tokenizer.
        text: The text to tokenise.
        specials: Whether the tokenizer adds its special tokens; False for a chat template, which brings its own.
        most: The model's context in tokens. A text of which a part is far longer already is not tokenised to its
            end: tens of megabytes would take minutes and gigabytes of memory.

    Raises:
        TooLong: it is longer than `most` by far.
    """
    size = len(text) if most is None else max(_CHARACTERS * most, 4096)
    while size < len(text):
        n = len(tokenizer(text[:size], add_special_tokens=False)["input_ids"])
        if most is not None and n > most + _MARGIN:
            raise TooLong(
                f"has {len(text)} characters, of which the first {size} alone are {n} tokens, more than the context of "
                f"{most} tokens"
            )
        size *= 4
    found = _with_specials(tokenizer, text, specials)
    added = found["special_tokens_mask"]
    if len(added) and all(added):  # nothing between what is put before and behind: a text that has tokens tells
        added = _with_specials(tokenizer, "a", specials)["special_tokens_mask"]
    n = len(found["input_ids"]) - _trailing(added)
    return Tokens(list(found["input_ids"][:n]), list(found["offset_mapping"][:n]))


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain text that goes on: see `tokenised`."""
    return tokenised(tokenizer, text).ids


def _with_specials(tokenizer: Any, text: str, specials: bool) -> Any:
    return tokenizer(
        text, add_special_tokens=specials, return_offsets_mapping=True, return_special_tokens_mask=True
    )  # fmt: skip


def _trailing(mask: Sequence[int]) -> int:
    """How many ones a mask ends with."""
    return next((n for n, one in enumerate(reversed(mask)) if not one), len(mask))
