"""Whether a model's heads are where the table of architectures says, found out by running the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from spd_lens.errors import SPDError
from spd_lens.models.device_map import writable
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.parity import CHECK_TEXTS, relative_error
from spd_lens.models.tokenizer import text_ids
from spd_lens.models.twin import run_twin, runnable
from spd_lens.models.weights import site_layer, twin_hook
from spd_lens.sites import Site

_N_TOKENS = 4
_TOLERANCE = 0.05
"""Largest relative error. Seen: 0 in every dtype, as signs are exact; features in another order are off by 0.1 to 2."""


@torch.no_grad()
def probe(twin: PreTrainedModel, tokenizer: Any, sites: Iterable[Site]) -> dict[Site, float]:
    """Compare the heads of K and V with those that the model's own attention puts into its cache.

    A random sign for each feature of a site, in the order that spd_lens takes the features to have, must come back in
    the cached keys or values, feature by feature. Signs pass through what stands between the projection and the cache:
    norms over a head or over all of them, and the rotation, which does nothing at the first position. Heads in another
    order, the wrong slice of a fused layer, or keys for values do not bring them back. And the layer must be affine in
    the weight and bias that a projection is folded into. One forward pass of a few tokens per site, in one batch.

    Args:
        twin: A transformers model.
        tokenizer: The model's tokenizer.
        sites: Sites to compare; kinds other than k and v never reach the cache and are left out.

    Returns:
        Per site the larger relative error of the two comparisons, in the model's dtype.

    Raises:
        SPDError: the model does not do what the table says, or keeps no keys and values that could be compared.
    """
    asked = [_Question(twin, site, row) for row, site in enumerate((s for s in sites if s.kind in ("k", "v")), start=1)]
    ids = text_ids(tokenizer, CHECK_TEXTS[0])[:_N_TOKENS]
    tokens = torch.tensor([ids] * (len(asked) + 1), device=twin.device)
    with contextlib.ExitStack() as stack:
        for question in asked:
            stack.enter_context(question.put())
        stack.enter_context(runnable(twin, " with a cache"))
        cache = run_twin(twin, tokens, use_cache=True).past_key_values
    found = {question.site: question.error(cache) for question in asked}
    for site, gap in found.items():
        if not gap <= _TOLERANCE:  # so that NaN is refused too
            raise SPDError(
                f"the {site.kind} of layer {site.layer} in {type(twin).__name__} is not where spd_lens looks for it: "
                f"what its attention computes with differs by {gap:.2g} of its size from heads, weight and bias as "
                "spd_lens reads them; choose another model, or report this architecture"
            )
    return found


class _Question:
    """One site's signs, put on one row of a batch of equal rows. Row 0 stays as it is."""

    def __init__(self, twin: PreTrainedModel, site: Site, row: int) -> None:
        self.twin, self.site, self.row = twin, site, row
        self.n_heads, self.d_head = Fingerprint.of(twin).heads_at(site)
        generator = torch.Generator().manual_seed(row)
        signs = torch.randint(0, 2, (self.n_heads, self.d_head), generator=generator) * 2 - 1
        self.signs = signs.to(twin.device, twin.dtype)
        self.layer = site_layer(twin, site)
        self.affine_error = torch.nan

    @contextlib.contextmanager
    def put(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.callback(self.layer.base.register_forward_hook(self._compare).remove)
            stack.callback(twin_hook(self.twin, self.site, self._flip).remove)
            yield

    def error(self, cache: Any) -> float:
        """The larger relative error, of the cached heads and of the layer."""
        try:
            entry = cache.layers[self.site.layer]
            first = (entry.keys if self.site.kind == "k" else entry.values)[:, :, 0]
        except (AttributeError, IndexError, TypeError) as error:
            raise SPDError(
                f"{type(self.twin).__name__} keeps no keys and values of layer {self.site.layer} in its cache, so that "
                "its heads cannot be compared with what spd_lens knows of them; choose another model or other layers"
            ) from error
        if first.shape[1] % self.n_heads or first.shape[2] != self.d_head:
            raise self._shape_error(f"caches {first.shape[1]} heads of {first.shape[2]}")
        # Falcon caches a KV head once per query head
        expected = first[0] * self.signs.to(first.device).repeat_interleave(first.shape[1] // self.n_heads, dim=0)
        return max(relative_error(first[self.row], expected), self.affine_error)

    def _flip(self, activation: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        if activation.shape[-1] != self.n_heads * self.d_head:
            raise self._shape_error(f"computes {activation.shape[-1]} features")
        flipped = activation.clone()
        flipped[self.row] *= self.signs.flatten().to(flipped.device)
        return flipped

    def _compare(self, _module: Any, args: tuple[Tensor], output: Tensor) -> None:
        """Compare the layer's output with what its weight and bias make of its input, on the row without signs."""
        base = self.layer.base
        with writable(base) as own:
            weight, bias = (None if x is None else x.to(output) for x in (own["weight"], own.get("bias")))
            assert weight is not None
            made = F.linear(args[0][0].to(output), weight.T if self.layer.transposed else weight, bias)
        self.affine_error = relative_error(output[0], made)

    def _shape_error(self, found: str) -> SPDError:
        return SPDError(
            f"{type(self.twin).__name__} {found} for {self.site.kind} at layer {self.site.layer}, not {self.n_heads} "
            f"heads of {self.d_head} as its configuration says; choose another model"
        )
