"""The weights that write K, V and Q, or read Z, from a checkpoint's files: one layer at a time, without the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from spd_lens.errors import UNREADABLE, SPDError, one_line
from spd_lens.models.adapter_files import is_peft
from spd_lens.models.architectures import architecture_of
from spd_lens.models.fingerprint import shape_of
from spd_lens.models.hub import local_directory
from spd_lens.sites import Site

_TRANSPOSED = ("gpt2",)
"""Architectures whose weights are stored as `[d_in, d_out]`."""


@dataclass(frozen=True)
class StoredLayer:
    """The part of one linear layer that writes a site's activation, or reads it (`z`), as the file holds it."""

    weight: Float[Tensor, "head d_head other"]
    """A row for each feature of the site; `other` is what the layer reads, or for `z` what it writes."""
    bias: Float[Tensor, "head d_head"] | None
    """What the layer adds to the features; None where it has no bias, and for `z`."""


class StoredLayers:
    """A checkpoint on disk; each layer's tensors are read when they are asked for, and not kept."""

    def __init__(self, name: str | Path) -> None:
        """Reads the configuration and the names of the tensors.

        Args:
            name: A directory, a `.gguf` file or a hub name, as `load` takes it.

        Raises:
            SPDError: there is no such checkpoint; it is an adapter, or damaged; it is of an architecture without K and
                V, or its weights are quantised.
        """
        self.name = str(name)
        directory = local_directory(self.name)
        if is_peft(directory):
            raise SPDError(f"{name} is an adapter, which has no weights of its own; give the checkpoint it goes with")
        try:
            config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # transformers raises many types on a damaged or unknown configuration
            raise SPDError(f"the model in {directory} cannot be read: {one_line(error, 300)}") from error
        if getattr(config.get_text_config(), "quantization_config", None) or getattr(
            config, "quantization_config", None
        ):
            raise SPDError(f"the weights of {name} are quantised, which rounds away what is looked for; give others")
        self._layout = architecture_of(config, self.name)
        self.n_layers, _, self.n_heads, self.n_kv_heads, self.d_head = shape_of(config, self.name)
        self._transposed = config.get_text_config().model_type in _TRANSPOSED
        self._files = dict(_tensors_in(directory))

    def heads_at(self, kind: str) -> int:
        """Heads at the sites of a kind."""
        return self.n_kv_heads if kind in ("k", "v") else self.n_heads

    def at(self, site: Site) -> StoredLayer | None:
        """The layer of a site of kind k, v, q or z; None where the block has no such layer."""
        name = self._named(f"{site.layer}.{self._layout.modules[site.kind]}")
        if name is None:
            return None
        n_heads, reads = self.heads_at(site.kind), site.kind == "z"
        features = self._layout.features(site.kind, self.n_heads, self.n_kv_heads, self.d_head)
        n = n_heads * self.d_head if features is None else self._n_fused
        weight, bias = self._read(f"{name}.weight"), None if reads else self._read(f"{name}.bias")
        if weight is not None and weight.ndim == 2 and reads != self._transposed:
            weight = weight.T
        if weight is None or weight.ndim != 2 or weight.shape[0] != n or not weight.is_floating_point():
            found = "missing" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"
            raise SPDError(
                f"the weight of {name} in {self.name} is {found}, and {n} features in floating point were expected; "
                "give a whole checkpoint that is not quantised"
            )
        if features is not None:
            weight, bias = weight[features], None if bias is None else bias[features]
        shape = (n_heads, self.d_head)
        return StoredLayer(weight.reshape(*shape, -1), None if bias is None else bias.reshape(shape))

    @property
    def _n_fused(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.d_head

    def _named(self, path: str) -> str | None:
        """The full name of a layer below the list of blocks: what comes before differs between kinds of checkpoints."""
        blocks = self._layout.blocks
        for above in (blocks, blocks.rpartition(".")[2]):
            pattern = re.compile(rf"((?:.*\.)?{re.escape(f'{above}.{path}')})\.weight")
            found = [match[1] for name in self._files if (match := pattern.fullmatch(name))]
            if len(found) > 1:
                raise SPDError(f"{self.name} has several layers {path} ({', '.join(found[:2])}); give one text model")
            if found:
                return found[0]
        return None

    def _read(self, name: str) -> Tensor | None:
        if name not in self._files:
            return None
        try:
            with safe_open(str(self._files[name]), framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SPDError(f"{self._files[name]} is damaged ({error}); get a complete copy") from error


def _tensors_in(directory: Path) -> Iterator[tuple[str, Path]]:
    """The names of all tensors, with the file that holds each."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as opened:
                yield from ((name, file) for name in opened.keys())  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError, *UNREADABLE) as error:
            raise SPDError(f"{file} is damaged ({error}); get a complete copy") from error
