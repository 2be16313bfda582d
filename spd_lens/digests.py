"""Short names for weights, subspaces, adapters and corpora, by content: what a resumed run compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from spd_lens.corpus import Record
from spd_lens.models.adapter_files import check_adapter
from spd_lens.models.fingerprint import weights_digest
from spd_lens.subspace import Subspace

__all__ = ["adapter_digest", "corpus_digest", "subspace_digest", "weights_digest"]


def subspace_digest(subspace: Subspace) -> str:
    """Names a subspace by the numbers that act: bases and offsets."""
    digest = hashlib.blake2b(digest_size=8)
    for site in subspace.sites:
        for part in (subspace.bases, subspace.offset):
            if site in part:
                digest.update(f"{site} {tuple(part[site].shape)}".encode())
                digest.update(part[site].detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()


def adapter_digest(adapter: str | Path) -> str:
    """Names an adapter or checkpoint by its files' content, wherever the directory has moved to."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(check_adapter(adapter).glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def corpus_digest(corpus: Iterable[Record]) -> str:
    """Names a corpus by what training sees: ids and tokens of its completions, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for record in corpus:
        digest.update(json.dumps([record.id, record.sample, record.prompt_ids, record.completion_ids]).encode())
    return digest.hexdigest()
