"""`Prefix`: layers below a policy's first compute what they computed for the base model, so they are not run again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spd_lens.models import ModelPair, site_layer
from spd_lens.sites import Site

log = logging.getLogger(__name__)

_exact: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()
"""Of each model, at which layers a pass may begin: the architecture decides that, so it is tried once."""


class Prefix:
    """Keeps what some layers begin with in a forward pass of the base model; later passes over that batch begin there.

    Layer `n_layers` stands for what comes behind the last block. A pass that begins in the middle has to be over the
    same tokens with the same padding. Architectures that pass anything between blocks but what a block returns would
    come out wrong, which `exact_starts` tells.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]) -> None:
        self._layers = sorted(set(layers))
        n_blocks = max(self._layers, default=0)
        self._blocks: list[Any] = [site_layer(model, Site(layer, "resid")).module for layer in range(n_blocks)]

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[int, Any]]:
        """Yields a table that the pass inside fills: by the layer, what the block below it returned."""
        begun: dict[int, Any] = {}
        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                keep = partial(_keep, begun, layer)
                stack.enter_context(self._blocks[layer - 1].register_forward_hook(keep))
            yield begun

    @contextlib.contextmanager
    def starting_at(self, layer: int, begun: Mapping[int, Any]) -> Iterator[None]:
        """Skip what lies below `layer`, as a recorded pass left it; a layer that was not recorded skips nothing."""
        below = self._blocks[:layer] if layer in begun else []
        own = [dict(vars(block)) for block in below]
        for block in below:
            block.forward = lambda *_, **__: begun[layer]
        try:
            yield
        finally:
            for block, before in zip(below, own, strict=True):
                del block.forward  # the class's own comes back
                vars(block).update(before)


def _keep(begun: dict[int, Any], layer: int, _block: nn.Module, _args: Any, output: Any) -> None:
    begun[layer] = output


def exact_starts(pair: ModelPair, layers: Iterable[int]) -> set[int]:
    """Those of some layers at which a pass may begin: it gives, bit for bit, what a whole pass gives."""
    wanted = set(layers) - {0}
    known = _exact.setdefault(pair.hf, {})
    if new := sorted(wanted - known.keys()):
        known |= _tried(lambda: pair.check_logits(pair.hf), pair.hf, new)
        if not all(map(known.get, new)):
            log.info("passes run all layers: those of %s cannot begin in the middle", type(pair.hf).__name__)
    return {layer for layer in wanted if known.get(layer)}


def _tried(forward: Callable[[], Tensor], model: nn.Module, layers: Iterable[int]) -> dict[int, bool]:
    """Whether a pass of the base model that begins at a layer agrees with a whole one, as far as any can begin."""
    found: dict[int, bool] = {}
    try:
        prefix = Prefix(model, layers)
        with prefix.recording() as begun:
            whole = forward()
        for layer in layers:
            with prefix.starting_at(layer, begun):
                found[layer] = torch.equal(forward(), whole)
    except Exception as error:  # unknown blocks, or such as need what lower ones left: each fails in its own way
        log.debug("a pass that begins in the middle of %s fails: %s", type(model).__name__, error)
    return found
