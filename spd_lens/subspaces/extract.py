"""`extract`: gradients of the correctness-aligned loss with respect to K and V, straight into moments (Eq. 6-8)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lens.errors import SPDError, caution, whole
from spd_lens.examples import Example, worked_examples
from spd_lens.models import (
    CHECK_TEXTS,
    Encoded,
    LensHook,
    ModelPair,
    Parity,
    Processes,
    drawn_tokens,
    dtype_name,
    fast_products,
    fastest_attention,
    free_memory,
    lens_logits,
    neutrally,
    positionwise_in_last_block,
    processes,
    right_pad,
    row_uniforms,
    run_only,
    run_twin,
    text_ids,
    token_losses,
    twin_hook,
    unembed_only,
    weights_digest,
)
from spd_lens.output import progress_bar
from spd_lens.settings import Extraction, ExtractionKeywords
from spd_lens.sites import Site
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.positions import positions_by_class, sinks_of
from spd_lens.subspaces.sums import moments_size

log = logging.getLogger(__name__)

# float16 gradients of a mean over few tokens underflow below 6e-8; a power of two is taken out again exactly. A larger
# one would overflow 65,504 in Gemma 2, whose soft caps pass a gradient on times 30 and 50 before they divide it again.
_HALF_SCALE = 2.0**10


@neutrally
def extract(
    pair: ModelPair,
    examples: Sequence[Example],
    *,
    settings: Extraction | None = None,
    shards: int = 8,
    batch_tokens: int | None = None,
    progress: bool = True,
    parallel: bool = True,
    **keywords: Unpack[ExtractionKeywords],
) -> GradientMoments:
    """Moments of the token gradients of all examples, for any rank afterwards.

    One forward and one backward pass per batch of similar length. Weights are frozen, nothing below the first target
    layer keeps a graph, and logits are computed only where a scored token is predicted. Each example's loss is a mean
    over its own `S`, so neither batching nor padding changes a row.

    Where torch.distributed has a group of several processes, all of them call `extract` with the same arguments, each
    takes every n-th batch, and all get the same sums, those of one process up to rounding in float64.

    Args:
        pair: The model pair.
        examples: Calibration examples with completion and spans.
        settings: Which gradients are captured, and where. None: the paper's choice.
        shards: Groups of examples kept apart, for halves and bootstrap. Memory grows with it: `2 · width²` float64
            numbers per shard and site (divided by the number of heads with `across_heads=False`), half as many again
            with `keep="cross"`, and all of that five times with `keep="classes"`.
        batch_tokens: Padded tokens per batch, which bounds memory. None: as many as memory allows, at most 1,024 on a
            CPU, where more gain nothing, and 16,384 on CUDA.
        progress: Whether to show a progress bar; the first of several processes shows one.
        parallel: Whether to share the batches with the other processes of torch.distributed's group. False: this
            process alone takes all of them.
        **keywords: Single settings, which take precedence over `settings`: layers, kinds, loss, engine,
            max_calibration_tokens, across_heads, keep, sinks, labels, seed. `spd_lens.settings.Extraction` says what
            they mean.

    Raises:
        SPDError: No examples, an example without span or completion or beyond the context, one whose scored tokens
            are all behind `max_calibration_tokens`, an unknown layer or kind, sinks of classes that are not kept, or
            moments that would not fit in the free memory. In every one of several processes: one of them fails or ends,
            or their versions, models, weights, examples or settings are not the same.
    """
    shards = whole("shards", shards)
    batch_tokens = None if batch_tokens is None else whole("batch_tokens", batch_tokens)
    settings = _checked(Extraction.given(settings, keywords, "extract"))
    if settings.sinks != "first" and "classes" not in settings.keep:
        raise SPDError(
            f"sinks={settings.sinks!r} would do nothing: the sums are kept over all positions; add keep='classes'"
        )
    with processes(parallel) as everyone:
        sites = pair.sites(settings.layers, settings.kinds)
        everyone.together(lambda: _check_memory(pair, sites, shards, settings))
        encoded = everyone.together(lambda: _encoded(pair, examples, settings))
        recorded = {"loss": settings.loss, "dtype": dtype_name(pair.dtype), **pair.format.departures}
        recorded |= {**_unusual(pair, settings), **settings.label}
        moments = GradientMoments.empty(
            pair.fingerprint, sites, shards, recorded, settings.keep, across_heads=settings.across_heads
        )
        if everyone.n > 1:
            more = {"layers": sites, "shards": shards, "batch_tokens": batch_tokens, **recorded}
            everyone.agree(_facts(pair, encoded, dict(settings) | more))
        batches = _batches(pair, encoded, sites, batch_tokens, everyone)
        rows = _rows(pair, encoded, batches, settings, progress and everyone.is_main)
        everyone.together(lambda: _add_all(moments, rows, shards, settings))
        everyone.add_up(moments.sums)
    return moments


_DOMINANT = 0.9
"""Share of a site's gradient energy that the first token may have. With SmolLM2-135M it is up to 0.85 (values)."""


def _add_all(moments: GradientMoments, gradients: Iterable[TokenGradients], shards: int, settings: Extraction) -> None:
    first: dict[Site, float] = defaultdict(float)
    energy: dict[Site, float] = defaultdict(float)
    for rows in gradients:
        shard, e = rows.index % shards, rows.encoded
        positions = positions_by_class(e, rows.sinks)
        for site, gradient in rows.gradient.items():
            moments.add_tokens(site, shard, gradient, rows.activation[site], positions)
            by_token = gradient.square().sum(dim=1)
            first[site] += float(by_token[0])
            energy[site] += float(by_token.sum())
        moments.count(shard, rows.loss, len(e.ids), e.scored, positions)

    shares = {site: first[site] / energy[site] for site in energy if energy[site]}
    dominated = [site for site, share in shares.items() if share > _DOMINANT]
    if dominated and "classes" not in settings.keep:
        worst = max(dominated, key=lambda site: shares[site])
        caution(
            f"{shares[worst]:.0%} of the gradient at {worst} is that of the first token, on which attention rests: its "
            "directions say little of the answers; the estimator no-sink leaves the first token out"
        )


def _facts(pair: ModelPair, encoded: Sequence[Encoded], settings: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in all processes that share an extraction, by what a message calls it."""
    texts = hashlib.blake2b(repr([(e.ids, e.completion_start, e.scored) for e in encoded]).encode(), digest_size=8)
    return {
        "the version of spd_lens": importlib.metadata.version("spd_lens"),
        "the model (by its fingerprint)": pair.fingerprint.digest(),
        "the digest of its weights": weights_digest(pair.hf),
        "the number of examples": str(len(encoded)),
        "the digest of their tokens": texts.hexdigest(),
        "the choice of settings": repr(sorted(settings.items())),
    }


def _check_memory(pair: ModelPair, sites: Sequence[Site], shards: int, settings: Extraction) -> None:
    """Refuse moments that would not fit: the system grants zeros that nobody has written to, and kills later."""
    heads = [pair.fingerprint.heads_at(site) for site in sites]
    size, free = partial(moments_size, heads, keep=settings.keep), free_memory(torch.device("cpu"))
    if (needed := size(shards, across_heads=settings.across_heads)) <= free:
        return
    ways = ["extract some layers at a time (layers=..., --layers)"]
    if shards > 1:
        ways.insert(0, f"take shards=1 ({_gb(size(1, across_heads=settings.across_heads))})")
    if settings.across_heads:
        ways.insert(
            0,
            f"keep each head's alone (across_heads=False, --no-across-heads: {_gb(size(shards, across_heads=False))})",
        )
    raise SPDError(
        f"the moments of {len(sites)} sites in {shards} shards take {_gb(needed)} of main memory, and {_gb(free)} are "
        f"free; {', or '.join(ways)}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _checked(settings: Extraction) -> Extraction:
    """The settings with `keep` as a list; `SPDError` for a choice that there is not."""
    keep = settings.keep.split(",") if isinstance(settings.keep, str) else [str(name) for name in settings.keep or ()]
    settings = settings.model_copy(update={"keep": [name.strip() for name in keep if name.strip()]})
    for name, choices in _CHOICES.items():
        found = getattr(settings, name)
        for one in found if isinstance(found, list) else [found]:
            if one not in choices:
                raise SPDError(f"unknown {name} {one!r}; choose from {', '.join(choices)}")
    whole("seed", settings.seed, least=None)
    return settings


_CHOICES = {
    "engine": ("lens", "twin"), "keep": ("classes", "cross"), "sinks": ("first", "attended"),
    "labels": ("gold", "sampled"),
}  # fmt: skip
_USUAL: dict[str, tuple[Any, ...]] = {
    "prompt_format": ("chat", "raw"), "add_special_tokens": (True,), "span_rule": ("overlap",),
    "max_calibration_tokens": (None,), "sinks": ("first",), "labels": ("gold",), "seed": (None,),
}  # fmt: skip
"""Settings that decide which text is read, what of it is scored and towards what, with the values that moments do not
record."""


def _unusual(pair: ModelPair, settings: Extraction) -> dict[str, Any]:
    values = {
        **pair.format.settings, "max_calibration_tokens": settings.max_calibration_tokens, "labels": settings.labels,
        "sinks": settings.sinks if "classes" in settings.keep else "first",
        "seed": settings.seed if settings.labels == "sampled" else None,
    }  # fmt: skip
    return {name: values[name] for name, usual in _USUAL.items() if values.get(name, usual[0]) not in usual}


def check_texts(moments: GradientMoments, pair: ModelPair, settings: Extraction, what: str) -> None:
    """Raise `SPDError` if these settings would write, score or cut texts in another way than the moments' were, or keep
    something that the moments do not. They may keep more.

    `what` is what a message calls the moments.
    """
    settings = _checked(settings)
    asked, instead = _unusual(pair, settings), "give the experiment another folder, or remove the file to extract again"
    for name in _USUAL:
        found, wanted = (one.get(name, "its usual value") for one in (moments.settings, asked))
        if found != wanted and (name != "sinks" or "classes" in settings.keep):
            raise SPDError(f"{what} holds an extraction whose {name} was {found}, and not {wanted}; {instead}")
    if lost := [name for name in settings.keep if name not in moments.kept]:
        raise SPDError(f"{what} holds an extraction that does not keep {lost[0]}; {instead}")
    if settings.across_heads and not moments.across_heads:
        raise SPDError(
            f"{what} holds an extraction with across_heads=False (--no-across-heads), and not True; {instead}"
        )


@dataclass(frozen=True)
class TokenGradients:
    """One example's rows of `G`: the gradient at every token of prompt and completion (Eq. 7)."""

    index: int
    """Which of the examples."""
    encoded: Encoded
    """Its tokens, and which of them are scored."""
    loss: float
    """Mean of `-log p` over `S`, in nats (Eq. 6)."""
    gradient: dict[Site, Float[Tensor, "token width"]]
    """`∂ loss / ∂ activation`, float64, all heads side by side."""
    activation: dict[Site, Float[Tensor, "token width"]]
    """The activation itself, in the model's dtype."""
    sinks: tuple[int, ...] = (0,)
    """Positions on which attention rests: the first, or what `sinks="attended"` finds."""


@neutrally
def token_gradients(
    pair: ModelPair,
    examples: Sequence[Example],
    *,
    settings: Extraction | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
    **keywords: Unpack[ExtractionKeywords],
) -> Iterator[TokenGradients]:
    """The rows that `extract` sums up, example by example in order of length; arguments and errors as there."""
    settings = _checked(Extraction.given(settings, keywords, "token_gradients"))
    batch_tokens = None if batch_tokens is None else whole("batch_tokens", batch_tokens)
    encoded = _encoded(pair, examples, settings)
    batches = _batches(pair, encoded, pair.sites(settings.layers, settings.kinds), batch_tokens, Processes())
    yield from _rows(pair, encoded, batches, settings, progress)


def _encoded(pair: ModelPair, examples: Sequence[Example], settings: Extraction) -> list[Encoded]:
    """The examples as tokens; `SPDError` for what cannot be extracted."""
    examples = worked_examples(examples, "calibration examples")
    if not examples:
        raise SPDError("there are no calibration examples; give at least one")
    pair.sites(settings.layers, settings.kinds)
    most = settings.max_calibration_tokens
    most = None if most is None else whole("max_calibration_tokens", most, least=2)
    encoded = [pair.encode(example, settings.loss, settings.engine, max_tokens=most) for example in examples]
    _say_shared(examples, encoded)
    return encoded


def _batches(
    pair: ModelPair, encoded: Sequence[Encoded], sites: Sequence[Site], batch_tokens: int | None, everyone: Processes
) -> list[list[int]]:
    """The batches that this process takes: all, or every n-th of those that several processes share."""
    if batch_tokens is None:
        fitting = everyone.gathered(fitting_tokens(pair, pair.n_layers - min(site.layer for site in sites)))
        # as all of them can hold, and few enough that each has a batch
        shares = [sum(len(e.ids) for e in encoded) // everyone.n] if everyone.n > 1 else []
        batch_tokens = max(1, min(fitting + shares))
    return pair.batches(encoded, batch_tokens)[everyone.rank :: everyone.n]


def _rows(
    pair: ModelPair, encoded: Sequence[Encoded], batches: Sequence[list[int]], settings: Extraction, progress: bool
) -> Iterator[TokenGradients]:
    """The rows of some batches, example by example."""
    sites = pair.sites(settings.layers, settings.kinds)
    tap = _tap(pair, sites, settings.engine, max(len(e.ids) for e in encoded))
    layers = sorted({site.layer for site in sites})
    with progress_bar(progress, total=sum(map(len, batches)), desc="extract", unit="example") as bar:
        for batch in batches:
            for rows in _batch_gradients(tap, batch, [encoded[i] for i in batch], pair, settings):
                yield replace(rows, sinks=sinks_of(pair, rows.encoded, layers, settings.sinks))
            bar.update(len(batch))


def _say_shared(examples: Sequence[Example], encoded: Sequence[Encoded]) -> None:
    """One warning for all examples whose prompt and completion share a token."""
    found = [(example.name, e.shared) for example, e in zip(examples, encoded, strict=True) if e.shared]
    if found:
        caution(
            f"{len(found)} of {len(examples)} calibration examples have a token that prompt and completion share, such "
            f"as {found[0][1]!r} of {found[0][0]}: it counts as the completion's, and generation from the prompt "
            "cannot produce it (spd-lens spans shows where)"
        )


def _tap(pair: ModelPair, sites: Sequence[Site], engine: str, longest: int) -> Tap:
    """The engine asked for; the twin where `backend="auto"` finds no lens model that agrees with it on such a text."""
    if engine == "lens":
        if pair.lens_if_any(longest) is not None:
            return Tap(pair, sites, on_lens=True)
        log.warning("no lens model of %s agrees with the twin: gradients are captured on the twin", pair.name)
    return Tap(pair, sites, on_lens=False)


def _batch_gradients(
    tap: Tap, indices: list[int], batch: list[Encoded], pair: ModelPair, settings: Extraction
) -> Iterator[TokenGradients]:
    tokens, mask = right_pad([e.ids for e in batch], pair.pad_id, pair.device)
    row = torch.tensor([i for i, e in enumerate(batch) for _ in e.scored], device=pair.device)
    target = torch.tensor([t for e in batch for t in e.scored], device=pair.device)
    with torch.enable_grad(), fast_products(pair.device, pair.dtype), tap.tapped() as activations:
        logits = tap.logits_at(tokens, mask, row, target - 1)  # position t - 1 predicts token t
        labels = tokens[row, target] if settings.labels == "gold" else _sampled(logits, batch, settings.seed)
        losses = token_losses(logits, labels)
        sizes = torch.tensor([len(e.scored) for e in batch], device=pair.device)
        per_example = torch.zeros(len(batch), device=pair.device, dtype=losses.dtype)
        per_example = per_example.index_add(0, row, losses / sizes[row])  # mean over S (Eq. 6)
        scale = _HALF_SCALE if pair.dtype == torch.float16 else 1.0
        gradients = torch.autograd.grad(per_example.sum() * scale, list(activations.values()))
    if not all(g.isfinite().all() for g in gradients):
        raise SPDError(
            f"gradients are not finite in {dtype_name(pair.dtype)} for example "
            f"{indices[0]} or one of its batch; load the model with dtype='float32' or 'bfloat16'"
        )
    for i, (index, e, value) in enumerate(zip(indices, batch, per_example.tolist(), strict=True)):
        length = len(e.ids)  # what follows is padding
        yield TokenGradients(
            index=index,
            encoded=e,
            loss=value,
            gradient={
                site: g[i, :length].flatten(1).double() / scale for site, g in zip(activations, gradients, strict=True)
            },
            activation={site: x.detach()[i, :length].flatten(1) for site, x in activations.items()},
        )


def _sampled(logits: Float[Tensor, "row d_vocab"], batch: Sequence[Encoded], seed: int) -> Int[Tensor, " row"]:
    """A label for each scored position of a batch, drawn from the model's own distribution there.

    The noise belongs to the text and to the place among its scored tokens, so no batch, order or id changes a label.
    """
    uniforms = [row_uniforms(seed, f"label {e.ids}", 0, len(e.scored)) for e in batch]
    return drawn_tokens(logits, torch.from_numpy(np.concatenate(uniforms)))


def fitting_tokens(pair: ModelPair, n_layers: int) -> int:
    """Tokens per batch that half of the free memory holds, where `n_layers` layers keep a graph."""
    most = 16_384 if pair.device.type == "cuda" else 1_024
    return max(1, min(most, int(free_memory(pair.device) / 2 / (n_layers * pair.kept_by_layer))))


class Tap:
    """A model with its K and V in reach of autograd: the lens model at its hook points, or the twin at its layers."""

    def __init__(self, pair: ModelPair, sites: Sequence[Site], *, on_lens: bool) -> None:
        self.on_lens, self.sites = on_lens, list(sites)
        self.model: Any = pair.proven_lens if on_lens else pair.hf
        self._head: nn.Module = self.model.unembed if on_lens else pair.hf.get_output_embeddings()
        self._last: list[nn.Module] = []
        """What of the last block is needed at the predicting positions alone."""
        if not on_lens and all(site.kind in ("k", "v") for site in sites if site.layer == pair.n_layers - 1):
            self._last = positionwise_in_last_block(pair.hf)
            if not self._exact_on(text_ids(pair.tokenizer, CHECK_TEXTS[0])[: pair.n_ctx]):
                self._last = []

    @contextlib.contextmanager
    def tapped(self) -> Iterator[dict[Site, Float[Tensor, "batch pos ..."]]]:
        """Activations of the forward pass run inside, each the start of a graph or a node of one."""
        activations: dict[Site, Tensor] = {}

        def keep(activation: Tensor, site: Site) -> Tensor:
            # With all weights frozen, nothing below the first target layer needs a graph: it begins here.
            if not activation.requires_grad:
                activation.requires_grad_()
            activations[site] = activation
            return activation

        hook = LensHook if self.on_lens else twin_hook
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                stack.callback(hook(self.model, site, partial(keep, site=site)).remove)
            yield activations

    def logits_at(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], row: Tensor, position: Tensor
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits at some positions only."""
        with unembed_only(self._head, row, position), run_only(self._last, row, position, tokens.shape[1]):
            return self._logits(tokens, mask)[0]

    def _logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.on_lens:
            return lens_logits(self.model, tokens, mask)
        # No mask: padding on the right is behind all that a real token attends to, and causal kernels are faster.
        with fastest_attention(self.model, tokens.shape[1]):
            return run_twin(self.model, tokens, use_cache=False).logits

    @torch.no_grad()
    def _exact_on(self, ids: list[int]) -> bool:
        """Whether the last block may run at some positions alone: in some architectures its parts mix positions."""
        tokens = torch.tensor([ids], device=self.model.device)
        row, position = torch.tensor([[0], [len(ids) - 1]], device=tokens.device)
        try:
            found = self.logits_at(tokens, torch.ones_like(tokens), row, position).double()
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            return False  # a part of the block that takes something else than activations of all positions
        whole = self._logits(tokens, torch.ones_like(tokens))[0, -1:].double()
        return Parity.between(whole, found).within(self.model.dtype)
