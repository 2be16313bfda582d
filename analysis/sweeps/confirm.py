"""The few cells that a sweep chose, measured with more effort: on fresh items, with more draws, and by generation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from spd_lens.analysis.common import LOSS_FIELDS, Estimated, Subject, Values, beside_random, contrasts, known
from spd_lens.analysis.sweeps.engine import beside_controls, measure
from spd_lens.analysis.sweeps.grid import Grid, GridCell
from spd_lens.analysis.sweeps.store import MEASURES, OTHER_TEXT
from spd_lens.evaluation import OUTCOMES, EvalResult, evaluate, repeated_ngrams
from spd_lens.examples import Example
from spd_lens.models import ModelPair, text_ids
from spd_lens.stats import Estimate, mean_interval, score_interval
from spd_lens.subspaces import Subspace

log = logging.getLogger(__name__)

CHOSEN_MEASURES = {
    **{field: f"change of {OUTCOMES[field]}, fresh items (nats per token)" for field in LOSS_FIELDS},
    "kl": "KL from base, fresh items (nats per token)",
    OTHER_TEXT: "KL from base, other text (nats per token)",
    "kl_own": "KL from base, its own completions (nats per token)",
    "accuracy": "accuracy",
    "repetition": "repeated 4-grams (share)",
    "truncated": "cut at the token limit (share)",
}
_SHARES = ("accuracy", "repetition", "truncated")


def measure_chosen(
    subject: Subject, estimated: Estimated, grid: Grid, cells: Sequence[GridCell], **also: Any
) -> pd.DataFrame:
    """Measure chosen cells on fresh items with ten fresh random draws, and by generation on the sweep's own items.

    `also`: the keywords `answer_only` and `texts` of `sweep`.
    """
    config = subject.run.config
    chosen = {cell.name: cell.estimated(estimated) for cell in cells}
    used = {item.id for item in subject.held_out(grid.n_items, grid.task)}
    fresh = [item for item in subject.held_out(2 * grid.n_items, grid.task) if item.id not in used]
    log.info("measuring the chosen cells on %d fresh items", len(fresh))
    again = remeasure(
        subject.pair, fresh, chosen, seed=grid.seed + 1000, strength=config.strength, batch_tokens=grid.batch_tokens,
        **also,
    )  # fmt: skip
    log.info("generating under the chosen cells")
    return pd.concat([again, _by_generation(subject, grid, chosen)], ignore_index=True)


def remeasure(
    pair: ModelPair,
    items: Sequence[Example],
    chosen: Mapping[str, Subspace],
    *,
    n_random: int = 10,
    seed: int = 1000,
    strength: float = 1.0,
    batch_tokens: int = 1024,
    **also: Any,
) -> pd.DataFrame:
    """Losses and KL of chosen subspaces on items that took no part in choosing them.

    The best of many cells looks better than it is; fresh items and fresh random draws undo that.
    """
    policies = beside_controls(chosen, n_random, seed, strength)
    found = measure(pair, items, policies, batch_tokens=batch_tokens, **also)
    return _rows(found, chosen, n_random, tuple(MEASURES))


def _by_generation(subject: Subject, grid: Grid, chosen: Mapping[str, Subspace]) -> pd.DataFrame:
    """Greedy completions under chosen subspaces and random ones of their shape: accuracy, repetition, length.

    Beside these there is the KL from the base model on the base model's own completions of the same prompts, since gold
    completions are another author's text, on which a model may be less sure. An interrupted run continues, and
    sweeps of one run share the completions of the base model and of cells that they have in common.
    """
    config, pair = subject.run.config, subject.pair
    task = subject.task if grid.task is None else subject.targets[grid.task]
    policies = beside_controls(chosen, grid.n_random, grid.seed, config.strength)
    place = subject.folder / "completions" / (grid.task or "source")
    results: dict[str, EvalResult] = {}
    for policy in policies:
        # by content: the same name in another sweep is another subspace
        stem = "base" if policy.subspace is None else policy.subspace.digest()
        results[policy.name] = evaluate(
            pair, task, grid.n_items, policy=policy, seed=config.data_seed, batch_size=config.generation_batch_size,
            forced=[], path=place / f"{stem}.jsonl", progress=subject.progress,
        )  # fmt: skip
    found = {policy: written(pair, result) for policy, result in results.items()}
    own = [  # the base model's completions as if they were gold
        replace(Example(item.prompt, id=item.id), completion=item.completion, spans=((0, len(item.completion)),))
        for item in results["base"].items
        if item.completion.strip()
    ]
    if own:
        for policy, values in measure(pair, own, policies, batch_tokens=grid.batch_tokens).items():
            found[policy]["kl_own"] = values["kl"]
    return _rows(found, chosen, grid.n_random, ("accuracy", "kl_own", "repetition", "truncated"))


def written(pair: ModelPair, result: EvalResult) -> Values:
    """What one policy's completions are like, item by item."""
    return {
        "accuracy": np.array([item.score for item in result.items]),
        "repetition": np.array([repeated_ngrams(text_ids(pair.tokenizer, item.completion)) for item in result.items]),
        "truncated": np.array([float(item.finish_reason == "length") for item in result.items]),
    }


def _rows(
    found: Mapping[str, Values], chosen: Mapping[str, Subspace], n_random: int, measures: Sequence[str]
) -> pd.DataFrame:
    """Base and chosen cells; `value` with its interval over items, then their random subspaces, then the contrast."""
    rows: list[dict[str, Any]] = []
    for name in measures:
        if name not in found["base"]:
            continue
        # losses are changes from base, shares and KL are as they are
        base = found["base"][name]
        shift = base if name in LOSS_FIELDS else np.zeros_like(base)
        own = {cell: known(found[cell][name] - shift, base) for cell in chosen}
        random = {
            cell: known(np.stack([found[f"{cell}/{i}"][name] for i in range(n_random)]) - shift, base)
            for cell in chosen
        }
        against = dict(zip(chosen, contrasts(list(own.values()), list(random.values())), strict=True))
        if name in _SHARES:
            rows.append({"cell": "base", "measure": name, **_estimate(base, name)})
        for cell in chosen:
            beside = beside_random(random[cell], against[cell])
            rows.append({"cell": cell, "measure": name, **_estimate(own[cell], name), **beside, "n_random": n_random})
    return pd.DataFrame(rows)


def _estimate(values: Float[np.ndarray, " item"], name: str) -> dict[str, float]:
    interval: Estimate = score_interval(values) if name in _SHARES else mean_interval(values)
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n_items": interval.n}
