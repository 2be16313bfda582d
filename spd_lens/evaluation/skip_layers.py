"""`Prefix`: layers below a projection compute what they computed for the base model, so they are not run again."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import Fingerprint, ModelPair, fast_products, neutrally, right_pad, run_twin, site_layer
from spd_lens.sites import Site

log = logging.getLogger(__name__)


class Prefix:
    """Keeps what enters some layers in a forward pass of the base model; later passes on that batch begin there.

    A forward pass inside `watching` records. One inside `starting_at(layer)` on the same tokens skips all layers below
    `layer` and gives the same bits; on other tokens it runs in full. Architectures that pass anything between layers
    but the residual stream would come out wrong: `agrees` tells, on a real batch.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]) -> None:
        self._model = model
        self._layers = sorted(set(layers))
        n_layers = Fingerprint.of(model).n_layers
        self._blocks: list[Any] = [site_layer(model, Site(layer, "resid")).module for layer in range(n_layers)]
        self._stream: dict[int, Tensor] = {}
        self._tokens: Tensor | None = None
        self._start: int | None = None
        self._skipping = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record, until the context ends."""
        hooks = [(self._model, self._begin), *((self._blocks[n], partial(self._enter, n)) for n in self._layers)]
        with contextlib.ExitStack() as stack:
            stack.callback(vars(self).update, _stream={}, _tokens=None)
            for module, hook in hooks:
                stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    @contextlib.contextmanager
    def starting_at(self, layer: int) -> Iterator[None]:
        """Skip what lies below `layer`."""
        below = self._blocks[:layer] if layer in self._layers else []
        own = [dict(vars(block)) for block in below]
        for block in below:
            block.forward = partial(self._pass_on, block.forward)
        self._start = layer if below else None
        try:
            yield
        finally:
            self._start = None
            for block, before in zip(below, own, strict=True):
                del block.forward  # the class's own comes back
                vars(block).update(before)

    def agrees(self, forward: Callable[[], Tensor]) -> bool:
        """Whether a pass of the base model that begins at each layer gives, bit for bit, what a whole pass gives."""
        with self.watching():
            whole = forward()
            for layer in self._layers:
                with self.starting_at(layer):
                    if not torch.equal(forward(), whole):
                        return False
        return True

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        known = self._tokens is not None and torch.equal(self._tokens, tokens)
        self._skipping = self._start is not None and known
        if self._start is None:
            self._tokens, self._stream = tokens, {}

    def _enter(self, layer: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._start is None:
            self._stream[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        elif self._skipping and layer == self._start:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": self._stream[layer]}
            return (self._stream[layer], *args[1:]), kwargs
        return None

    def _pass_on(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._skipping:
            return forward(*args, **kwargs)
        return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@neutrally
def exact_prefix(pair: ModelPair, items: Sequence[Example], layers: Iterable[int]) -> Prefix | None:
    """A prefix for passes that begin at some of these layers; None where this architecture's blocks let no pass begin
    in the middle exactly."""
    above = set(layers) - {0}
    if not above:
        return None
    try:
        prefix = Prefix(pair.hf, above)
    except SPDError:  # an architecture whose blocks are not known
        return None
    shortest = sorted((pair.encode(item) for item in items), key=lambda e: len(e.ids))[:2]
    tokens, mask = right_pad([e.ids for e in shortest], pair.pad_id, pair.device)
    with torch.no_grad(), fast_products(pair.device, pair.dtype):
        exact = prefix.agrees(lambda: run_twin(pair.hf, tokens, attention_mask=mask, use_cache=False).logits)
    if not exact:
        log.info("every pass runs all layers: those of %s cannot begin in the middle", type(pair.hf).__name__)
    return prefix if exact else None
