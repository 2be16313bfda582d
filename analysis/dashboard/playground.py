"""`Playground`: one prompt under the base model, a projection, a random subspace and the fine-tuned adapter."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common import Piece, Subject, word_diff
from spd_lens.analysis.dashboard.document import known_moments
from spd_lens.errors import SPDError, shortened
from spd_lens.examples import Example
from spd_lens.models import ModelPair, kl_divergence, neutral, run_twin
from spd_lens.output import visible
from spd_lens.sites import Site
from spd_lens.subspaces import Policy, Rank, Subspace

MAX_PROMPT = 8000
MAX_NEW_TOKENS = 512
TOP = 10
NAMES = {
    "base": "base",
    "projected": "under the projection",
    "random": "random subspace of the same ranks",
    "spd": "after SPD",
}


@dataclass(frozen=True)
class Ask:
    """What to generate. Nothing in it is trusted: `Playground.answer` checks all of it."""

    prompt: str
    layers: Sequence[int]
    kinds: Sequence[str]
    rank: Rank
    """Directions per block."""
    per_head: bool = True
    strength: float = 1.0
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 42
    also: Sequence[str] = ("random",)
    """Further policies beside the base and the projection: `"random"`, `"spd"`."""


@dataclass(frozen=True)
class Said:
    """What one policy made of the prompt."""

    policy: str
    text: str
    ended: bool
    """Whether the model ended by itself."""
    pieces: Sequence[Piece]
    """The text, compared with that of the base model."""
    kl: float
    """KL(base || policy) of the next token after the prompt, in nats."""
    probabilities: Sequence[float]
    """Probability of each of `Answer.tokens` as the next token after the prompt."""


@dataclass(frozen=True)
class Answer:
    """Completions and next-token probabilities, the base model first."""

    tokens: Sequence[str]
    """The next tokens that are most probable under the base or the projected model, most probable first."""
    said: Sequence[Said]
    ranks: str
    """Ranks that the projection has, which are lower than asked for if the gradients had fewer directions."""


@dataclass
class Playground:
    """A run's experiment, for one question at a time: generation folds the projection into the model's weights."""

    subject: Subject
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a question is answered; the playgrounds of one process share it."""

    def __post_init__(self) -> None:
        self.moments = known_moments(self.subject)
        self.estimated = self.subject.estimated(layers=self.subject.known_layers)
        self.pair = self.subject.pair

    @property
    def layers(self) -> list[int]:
        """Layers whose gradients are known: all of them if an analysis has extracted them, else the run's own."""
        return sorted({site.layer for site in self.moments.sites})

    @property
    def kinds(self) -> list[str]:
        """Kinds whose gradients are known."""
        return sorted({site.kind for site in self.moments.sites})

    @property
    def adapter(self) -> bool:
        """Whether the run has been fine-tuned."""
        return (self.subject.run.path / "adapter").exists()

    def width(self, per_head: bool) -> int:
        """Number of directions of a block; of the narrowest block if kinds differ."""
        moments = self.moments
        return min(moments.width(site) // (moments.n_heads[site] if per_head else 1) for site in moments.sites)

    def subspace(self, ask: Ask) -> Subspace:
        """The subspace that is asked for; `SPDError` for layers, kinds or ranks that do not exist."""
        layers, kinds = _chosen("layer", ask.layers, self.layers), _chosen("kind", ask.kinds, self.kinds)
        sites = [site for layer in layers for kind in kinds if (site := Site(layer, kind)) in self.moments.sites]
        if not sites:
            raise SPDError("none of the chosen layers has one of the chosen kinds; choose others")
        return self.estimated(ask.rank, sites, per_head=ask.per_head)

    def answer(self, ask: Ask) -> Answer:
        """Generate under every policy with the same noise, one after the other.

        Raises:
            SPDError: Something in `ask` is out of range, or another question is being answered.
        """
        _check(ask)
        if not self.lock.acquire(blocking=False):
            raise SPDError("another completion is being generated; wait until it is done, then ask again")
        try:
            return self._answer(ask)
        finally:
            self.lock.release()

    def _answer(self, ask: Ask) -> Answer:
        subspace = self.subspace(ask)
        policies = [Policy("base"), Policy("projected", subspace, ask.strength)]
        if "random" in ask.also:
            policies.append(Policy("random", subspace.random_like(ask.seed), ask.strength))
        if "spd" in ask.also:
            policies.append(Policy("spd", adapter=self.subject.run.adapter))
        prompt = Example(ask.prompt, id="dashboard")
        config = self.subject.run.config.model_copy(update={"max_new_tokens": ask.max_new_tokens, "seed": ask.seed})
        experiment = self.subject.experiment.varied(config=config, progress=False)
        sampling = {"temperature": ask.temperature}
        texts = [
            experiment.generate(None, policy, [prompt], sampling=sampling, engine="twin")[0] for policy in policies
        ]
        logits = torch.stack([self._next_logits(policy, prompt) for policy in policies])
        probabilities = logits.softmax(-1)
        order = probabilities[:2].amax(0).topk(min(TOP, probabilities.shape[-1])).indices
        kl = kl_divergence(logits[:1], logits)
        said = [
            Said(
                policy.name,
                visible(text.completion),
                text.finish_reason != "length",
                word_diff(visible(texts[0].completion), visible(text.completion)),
                float(kl[i]),
                probabilities[i, order].tolist(),
            )
            for i, (policy, text) in enumerate(zip(policies, texts, strict=True))
        ]
        ranks = "; ".join(f"{site}: {'/'.join(map(str, subspace.ranks[site]))}" for site in subspace.sites)
        return Answer([_token(self.pair, int(i)) for i in order], said, ranks)

    @torch.no_grad()
    def _next_logits(self, policy: Policy, prompt: Example) -> Float[Tensor, " d_vocab"]:
        ids = torch.tensor([self.pair.prompt_ids(prompt)], device=self.pair.device)
        with neutral(*self.pair.models), policy.applied(self.pair) as model:
            logits: Tensor = run_twin(model, ids, use_cache=False).logits[0, -1]
        return logits.double().cpu()


T = TypeVar("T", int, str)


def _chosen(what: str, wanted: Sequence[T], there: Sequence[T]) -> list[T]:
    if not wanted:
        raise SPDError(f"no {what} is chosen; choose from {', '.join(map(str, there))}")
    for one in wanted:
        if one not in there:
            known = ", ".join(map(str, there))
            raise SPDError(f"there is no {what} {shortened(repr(one))} in this run's moments; choose from {known}")
    return sorted(set(wanted), key=there.index)


def _check(ask: Ask) -> None:
    if not isinstance(ask.prompt, str) or not ask.prompt.strip():
        raise SPDError("the prompt is empty; write something")
    if len(ask.prompt) > MAX_PROMPT:
        raise SPDError(f"the prompt has {len(ask.prompt)} characters; write at most {MAX_PROMPT}")
    _whole("max new tokens", ask.max_new_tokens, 1, MAX_NEW_TOKENS)
    _whole("seed", ask.seed, 0, 2**32 - 1)
    if not isinstance(ask.rank, float):
        _whole("rank", ask.rank, 1, None)
    _number("strength", ask.strength, 0, 1)
    _number("temperature", ask.temperature, 0, 10)
    for name in ask.also:
        if name not in ("random", "spd"):
            raise SPDError(f"unknown policy {shortened(repr(name))}; choose from random, spd")


def _whole(what: str, value: object, low: int, high: int | None) -> None:
    inside = type(value) is int and value >= low and (high is None or value <= high)
    if not inside:
        limit = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise SPDError(f"{what} is {_short(value)}; write a whole number {limit}")


def _number(what: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SPDError(f"{what} is {_short(value)}; write a number from {low} to {high}")


def _short(value: object) -> str:
    return "empty" if value is None else shortened(str(value))


def _token(pair: ModelPair, index: int) -> str:
    """A token as one reads it: spaces and line breaks shown, special tokens by their names."""
    text = pair.tokenizer.decode([index]) or pair.tokenizer.convert_ids_to_tokens(index)
    return visible(text).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
