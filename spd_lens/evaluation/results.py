"""`EvalResult`: every item's prompt, completion, answer and verdict, and the estimates that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import with_config

from spd_lens.errors import SPDError
from spd_lens.evaluation.outcomes import OUTCOMES
from spd_lens.files import STRICT, Loss, Schema, fitting, read_json, write_json
from spd_lens.stats import Estimate, mean_interval, paired_difference, score_interval

_LEFT_OUT = {"copies_loss": None, "results_loss": None, "answer_only_loss": None, "rest_loss": None, "judged": True}
"""What an item's record leaves out where it says nothing, like records of versions that knew none of them."""


@with_config(STRICT)
@dataclass(frozen=True)
class ItemResult:
    """One test item under one policy."""

    id: str
    prompt: str
    gold: str
    """The gold completion."""
    completion: str
    """What the policy wrote, greedily."""
    answer: str | None
    """The answer extracted from it; None if it gives none."""
    score: float
    """The task's verdict in [0, 1]."""
    n_tokens: int
    """Length of the completion in tokens."""
    finish_reason: str
    """`"eos"`, `"stop"` (a stop string of the model's generation config) or `"length"`."""
    aligned_loss: Loss | None = None
    """Nats per correctness token of the gold completion; None if the item has no spans."""
    completion_loss: Loss | None = None
    """Nats per token of the gold completion."""
    kl: Loss | None = None
    """KL(base || policy) in nats per token of the gold completion."""
    token_accuracy: float | None = None
    """Share of the gold completion's tokens that are the policy's most probable next token."""
    choice: str | None = None
    """Multiple choice: the answer with the largest log-likelihood."""
    choice_score: float | None = None
    """The task's verdict on that answer, in [0, 1]."""
    results_loss: Loss | None = None
    """Nats per token of each value of the gold completion where it is computed; None where the task marks none."""
    copies_loss: Loss | None = None
    """Nats per token of the answer where its value stands earlier in the gold completion; None where none does."""
    rest_loss: Loss | None = None
    """Nats per token of the gold completion that is neither; None where nothing is marked."""
    answer_only_loss: Loss | None = None
    """Nats per token of the answer where it is asked for without reasoning; None where it cannot be."""
    judged: bool = True
    """Whether anything tells right from wrong. If not (a wrong answer passes the item's tests), the score is 0."""


@dataclass(frozen=True)
class EvalResult:
    """What one policy did on the test items of one task."""

    policy: str
    task: str
    items: list[ItemResult]
    settings: dict[str, Any] = field(default_factory=dict)
    """Model, seed, token limits: what one needs to make it again."""

    @property
    def accuracy(self) -> Estimate:
        """Mean score with its 95 % interval (Wilson where all scores are 0 or 1). Items that cannot be judged are left
        out, unless there are no others."""
        return score_interval([item.score for item in self.items if item.judged] or [0.0] * len(self.items))

    @property
    def n_unjudged(self) -> int:
        """Number of items that cannot be judged, since a wrong answer passes their tests."""
        return sum(not item.judged for item in self.items)

    @property
    def mean_length(self) -> Estimate:
        """Mean length of the completions in tokens."""
        return mean_interval([item.n_tokens for item in self.items])

    @property
    def truncated(self) -> Estimate:
        """Share of completions that were cut at the token limit."""
        return score_interval([float(item.finish_reason == "length") for item in self.items])

    @property
    def aligned_loss(self) -> Estimate | None:
        """Mean NLL of the correctness tokens, in nats; None where no item has spans."""
        return self._mean(lambda item: item.aligned_loss)

    @property
    def copies_loss(self) -> Estimate | None:
        """Mean NLL of the answers' tokens that can be copied, in nats; None where no item has any."""
        return self._mean(lambda item: item.copies_loss)

    @property
    def results_loss(self) -> Estimate | None:
        """Mean NLL of values where they are computed, in nats per token; None where no item has any."""
        return self._mean(lambda item: item.results_loss)

    @property
    def answer_only_loss(self) -> Estimate | None:
        """Mean NLL of the answers asked for without reasoning, in nats per token; None where none can be."""
        return self._mean(lambda item: item.answer_only_loss)

    @property
    def rest_loss(self) -> Estimate | None:
        """Mean NLL of what is neither a result nor a copy, in nats per token; None where nothing is marked."""
        return self._mean(lambda item: item.rest_loss)

    @property
    def completion_loss(self) -> Estimate | None:
        """Mean NLL of the gold completions, in nats per token (the paper's measure on CodeAlpaca)."""
        return self._mean(lambda item: item.completion_loss)

    @property
    def token_accuracy(self) -> Estimate | None:
        """Mean share of gold tokens that are the most probable next token."""
        return self._mean(lambda item: item.token_accuracy)

    @property
    def choice_accuracy(self) -> Estimate | None:
        """Multiple choice by log-likelihood of the answers; None for other tasks."""
        scores = [item.choice_score for item in self.items if item.choice_score is not None]
        return score_interval(scores) if scores else None

    @property
    def kl(self) -> Estimate | None:
        """Mean KL(base || policy), in nats per token of the gold completions."""
        return self._mean(lambda item: item.kl)

    def accuracy_gain(self, base: EvalResult) -> Estimate:
        """Mean paired difference of scores, this policy minus `base`, on the same items."""
        return paired_difference(*self.paired_scores(base))

    def paired_scores(self, base: EvalResult) -> tuple[list[float], list[float]]:
        """The scores of `base` and of this policy, item by item, without items that cannot be judged, as `accuracy`."""
        mine, theirs = self._by_id(), base._by_id()
        if mine.keys() != theirs.keys():
            raise SPDError(f"{self.policy} and {base.policy} were evaluated on different items of {self.task}")
        ids = [i for i in mine if mine[i].judged and theirs[i].judged] or list(mine)
        return [theirs[i].score for i in ids], [mine[i].score for i in ids]

    def _by_id(self) -> dict[str, ItemResult]:
        return {item.id: item for item in self.items}

    def _mean(self, value: Callable[[ItemResult], float | None]) -> Estimate | None:
        values = [v for v in map(value, self.items) if v is not None]
        return mean_interval(values) if values else None

    def __repr__(self) -> str:
        measures = {"accuracy": self.accuracy, "accuracy by likelihood": self.choice_accuracy}
        measures |= {heading: getattr(self, outcome) for outcome, heading in OUTCOMES.items()}
        shown = ", ".join(f"{name} {value}" for name, value in measures.items() if value is not None)
        if self.n_unjudged:
            shown += f", cannot be judged {self.n_unjudged}"
        return f"EvalResult({self.policy} on {self.task}: {shown})"

    def save(self, path: str | Path) -> Path:
        """Write JSON, whole or not at all."""
        record = asdict(self)
        for item in record["items"]:
            for name, nothing in _LEFT_OUT.items():
                if item[name] is nothing:
                    del item[name]
        return write_json(path, {"kind": "EvalResult", **record})

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Read what `save` wrote."""
        record = read_json(path)
        if not isinstance(record, dict) or record.get("kind") != "EvalResult":
            raise SPDError(f"{path} does not hold an evaluation of spd_lens; give the right file")
        found = fitting(_Record, record, path)
        return cls(found.policy, found.task, found.items, found.settings)


class _Record(Schema):
    """An evaluation in a file."""

    kind: Literal["EvalResult"]
    policy: str
    task: str
    items: list[ItemResult]
    settings: dict[str, Any]
