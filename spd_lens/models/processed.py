"""Lens models that are no longer what was built: edited, or with weights that TransformerLens has processed.

Processing (`enable_compatibility_mode()`, `process_weights_()`, most ways to load a HookedTransformer) keeps what a
model predicts and changes what it computes in between: a value bias that is folded into the output's is no longer part
of V, so that a projection of V has another effect.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.models.backends import lens_logits
from spd_lens.models.fingerprint import weights_digest
from spd_lens.models.hooks import LensHook
from spd_lens.models.neutral import neutral
from spd_lens.models.parity import TOLERANCE, Parity, relative_error
from spd_lens.models.torch_private import times_written
from spd_lens.models.twin import run_twin
from spd_lens.models.weights import UnknownLayer, twin_hook
from spd_lens.sites import Site

_N_TOKENS = 8
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest difference of a site's activations, relative to their norm. Seen: 2e-6 in float32, 0.02 in bfloat16; folded
value biases: 0.1 and more."""
INSTEAD = (
    "its weights were processed, as enable_compatibility_mode(), process_weights_() and from_pretrained of "
    "HookedTransformer do it; take pair.lens of a freshly loaded pair, or pair.drop_lens() and pair.lens again"
)


class _Origin(NamedTuple):
    """What a lens model was made from."""

    twin: weakref.ref[nn.Module]
    state: Any
    """The lens model's state when the two were last known to agree."""
    weights: str
    """A digest of the twin's weights at that time."""


_origins: weakref.WeakKeyDictionary[nn.Module, _Origin] = weakref.WeakKeyDictionary()


def remember(lens: nn.Module, twin: nn.Module) -> None:
    """Note that a lens model agrees with its twin as both are now."""
    _origins[lens] = _Origin(weakref.ref(twin), _state(lens), weights_digest(twin))


def is_as_built(lens: nn.Module) -> bool:
    """Whether neither the lens model nor its twin has changed since they were last known to agree."""
    origin = _origins.get(lens)
    if origin is None or (twin := origin.twin()) is None:
        return False
    return _state(lens) == origin.state and weights_digest(twin) == origin.weights


def is_processed(lens: Any) -> bool:
    """Whether TransformerLens says that it has processed the weights."""
    return getattr(lens, "_weights_processed", False) or str(lens.cfg.normalization_type).endswith("Pre")


def refuse_processed(lens: Any, sites: Iterable[Site]) -> None:
    """Raise `SPDError` if activations at the sites are not the model's own, although its predictions are.

    A lens model with other predictions was edited on purpose, and its activations are its own.
    """
    sites = list(sites)
    origin = _origins.get(lens)
    twin: Any = origin.twin() if origin is not None else None
    if origin is None or twin is None:
        _refuse_folded_biases(lens, sites)
        return
    if _state(lens) == origin.state:
        return
    with contextlib.suppress(UnknownLayer):  # the twin cannot be asked
        gaps = _gaps(lens, twin, sites)
        wrong = [site for site, gap in gaps.items() if not gap <= _TOLERANCE[twin.dtype]]
        if wrong:
            raise SPDError(
                f"the lens model predicts what its twin does, but its activations at {wrong[0]} are others (by "
                f"{gaps[wrong[0]]:.2g} of their size), and so is what a projection does there: {INSTEAD}"
            )


@torch.no_grad()
def _gaps(lens: Any, twin: Any, sites: Sequence[Site]) -> dict[Site, float]:
    """How far activations on a few tokens are apart; none where the two models predict different things."""
    seen: dict[str, dict[Site, Tensor]] = {"lens": {}, "twin": {}}

    def keep(who: str, site: Site, activation: Tensor) -> Tensor:
        seen[who][site] = activation.reshape(*activation.shape[:2], -1).double()
        return activation

    tokens = torch.arange(_N_TOKENS, device=twin.device)[None]
    with neutral(lens, twin), contextlib.ExitStack() as stack:
        for site in sites:
            stack.callback(LensHook(lens, site, partial(keep, "lens", site)).remove)
            stack.callback(twin_hook(twin, site, partial(keep, "twin", site)).remove)
        logits = lens_logits(lens, tokens, torch.ones_like(tokens))[0].double()
        own = run_twin(twin, tokens, use_cache=False).logits[0].double()
    if not Parity.between(own, logits).kl <= TOLERANCE[twin.dtype][1]:
        return {}
    return {site: relative_error(seen["lens"][site], seen["twin"][site]) for site in sites}


def _refuse_folded_biases(lens: Any, sites: Sequence[Site]) -> None:
    """Refuse a lens model that was made elsewhere and has key biases but not one value bias: those were folded."""
    for layer in {site.layer for site in sites if site.kind == "v"}:
        attention = getattr(lens.blocks[layer], "attn", None)
        keys, values = getattr(attention, "b_K", None), getattr(attention, "b_V", None)
        biases = [bias.any() for bias in (keys, values) if isinstance(bias, Tensor)]
        if len(biases) == 2 and biases[0] and not biases[1]:
            raise SPDError(f"this lens model has key biases, but no value biases at layer {layer}: {INSTEAD}")


def _state(lens: nn.Module) -> Any:
    """Changes whenever a weight is replaced or written to."""
    return [(name, id(weight), times_written(weight)) for name, weight in lens.named_parameters()]
