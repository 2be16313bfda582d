"""Which model is this? Shape and a sample of the embedding matrix, the same for lens and twin and in every dtype."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from spd_lens.errors import DamagedFile, SPDError
from spd_lens.files import Schema, fitting
from spd_lens.models.architectures import n_kv_heads
from spd_lens.models.device_map import stored_weights
from spd_lens.models.neutral import neutral
from spd_lens.sites import Site

_SAMPLES = 64
_BELOW = "spd_lens_fingerprint"
_MIN_COSINE = 0.999  # rounding to bfloat16 leaves 0.99999; another model of the same shape is near 0
_UNIT = 1e-6
"""How far from 1 the norm of a sample is at most: 64 numbers of eight decimals."""


class _Record(Schema):
    """A fingerprint in a file."""

    n_layers: int = Field(ge=1, le=10**5)
    d_model: int = Field(ge=1, le=10**7)
    n_heads: int = Field(ge=1, le=10**5)
    n_kv_heads: int = Field(ge=1, le=10**5)
    d_head: int = Field(ge=1, le=10**6)
    sample: list[float] = Field(min_length=_SAMPLES, max_length=_SAMPLES)


@dataclass(frozen=True)
class Fingerprint:
    """Tells models apart, whatever backend and dtype they are held in.

    The embedding matrix is sampled because LoRA, folding and projection leave it alone, and because TransformerLens
    and transformers store it in the same layout (up to a scale, which the comparison ignores).
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    sample: tuple[float, ...]
    """64 entries of the embedding matrix at fixed places, scaled to unit norm."""

    @classmethod
    @neutral()
    def of(cls, model: Any) -> Fingerprint:
        """The fingerprint of a HookedTransformer, TransformerBridge or transformers model, without its adapter."""
        below: Fingerprint | None = getattr(model, _BELOW, None)
        if below is not None:
            return below
        n_layers, d_model, n_heads, n_kv_heads, d_head = _shape(model)
        embed: Any = model.embed if hasattr(model, "cfg") else model.get_input_embeddings()
        embedding: Float[Tensor, "d_vocab d_model"] = embed.W_E if hasattr(embed, "W_E") else embed.weight
        rows = torch.arange(_SAMPLES) * 7919 % min(1000, embedding.shape[0])
        columns = torch.arange(_SAMPLES) * 104729 % embedding.shape[1]
        sample = embedding.detach()[rows.to(embedding.device), columns.to(embedding.device)].double().cpu()
        sample = sample / sample.norm().clamp_min(1e-30)
        return cls(n_layers, d_model, n_heads, n_kv_heads, d_head, tuple(round(x, 8) for x in sample.tolist()))

    def remember(self, model: Any) -> None:
        """Make this the model's fingerprint, whatever an adapter changes, as long as the model keeps the attribute."""
        setattr(model, _BELOW, self)

    def heads_at(self, site: Site) -> tuple[int, int]:
        """Heads at a site and their width; the residual stream is one head of `d_model`."""
        if site.kind == "resid":
            return 1, self.d_model
        return (self.n_kv_heads if site.kind in ("k", "v") else self.n_heads), self.d_head

    def check(self, other: Fingerprint, what: str) -> None:
        """Raise `SPDError` if `other`, the model at hand, is not the model that `what` was made from."""
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise SPDError(
                    f"{what} was made from another model: it has {name} = {mine}, this model has {theirs}; "
                    "extract it again from this model"
                )
        mine, theirs = (torch.tensor(one.sample, dtype=torch.float64, device="cpu") for one in (self, other))
        cosine = (mine / mine.norm() @ (theirs / theirs.norm())).item() if len(mine) == len(theirs) else math.nan
        if not cosine >= _MIN_COSINE:  # NaN too
            raise SPDError(
                f"{what} was made from another model of the same shape (its embeddings agree to a cosine of only "
                f"{cosine:.3f}); extract it again from this model"
            )

    def digest(self) -> str:
        """Names the model in 16 hexadecimal digits, the same in every dtype: of the shape and of the sample's signs."""
        signs = "".join("+" if entry > 0 else "-" for entry in self.sample)
        shape = f"{self.n_layers} {self.d_model} {self.n_heads} {self.n_kv_heads} {self.d_head}"
        return hashlib.blake2b(f"{shape} {signs}".encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sample": list(self.sample)}

    @classmethod
    def from_dict(cls, fields: Any, where: str | Path = "a model's fingerprint") -> Fingerprint:
        """What `to_dict` made; `DamagedFile`, which names `where`, for anything else.

        A sample that is no unit vector of numbers would agree with every model, or with none.
        """
        record = fitting(_Record, fields, where)
        if not abs(math.hypot(*record.sample) - 1) < _UNIT:
            raise DamagedFile(f"{where} has a fingerprint that is no model's: its sample is no unit vector")
        return cls(**{**record.model_dump(), "sample": tuple(record.sample)})


@neutral()
def weights_digest(model: nn.Module) -> str:
    """Tells whether weights changed, from about 16 entries per parameter: training shows, one edited entry may not."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in stored_weights(model):
        flat = parameter.detach().flatten()
        digest.update(name.encode())
        some = flat[:: max(flat.numel() // 16, 1)].to("cpu", torch.float32, copy=True)
        digest.update(some.numpy().tobytes())  # of a copy: numpy would end the sharing of copy-on-write storage
    return digest.hexdigest()


def _shape(model: Any) -> tuple[int, int, int, int, int]:
    cfg = getattr(model, "cfg", None)
    if cfg is not None:  # both TransformerLens backends
        return cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head
    return shape_of(model.config, type(model).__name__)


def shape_of(config: Any, name: str) -> tuple[int, int, int, int, int]:
    """Layers, width, heads, KV heads and width of a head that a configuration of transformers says; `name` is what a
    message calls the model. Raises `SPDError` for a model without attention."""
    config = config.get_text_config()
    n_heads = getattr(config, "num_attention_heads", None)
    if not n_heads:
        raise SPDError(
            f"the configuration of {name} names no attention heads, so there are no keys and values to "
            "project; choose a transformer with attention"
        )
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return config.num_hidden_layers, config.hidden_size, n_heads, n_kv_heads(config), d_head
