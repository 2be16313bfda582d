"""`evaluate`: teacher-forced measures first, then greedy completions and the task's own score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spd_lens import tasks
from spd_lens.errors import SPDError, whole
from spd_lens.evaluation.choices import most_likely
from spd_lens.evaluation.outcomes import with_answer_only
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.evaluation.teacher_forced import ForcedItem, teacher_forced
from spd_lens.examples import Example
from spd_lens.generation import APPLIED, NOT_APPLIED, Corpus, check_room, generate, recorded_settings
from spd_lens.models import ModelPair, dtype_name, neutrally
from spd_lens.subspaces import Policy, Subspace
from spd_lens.tasks import Task


@neutrally
def evaluate(
    pair: ModelPair,
    task: Task | str,
    n: int = 100,
    subspace: Subspace | None = None,
    adapter: str | Path | None = None,
    *,
    policy: Policy | None = None,
    strength: float = 1.0,
    seed: int = 42,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    name: str | None = None,
    forced: Sequence[ForcedItem] | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> EvalResult:
    """Score the base, the projected or the fine-tuned policy on a task's test items.

    Completions are greedy, under what the model's generation config asks for (see `generate`).

    Args:
        pair: The model pair.
        task: A task, or the name of one that needs no path.
        n: Number of test items. The same `n` and `seed` give the same items to every policy.
        subspace: The subspace of the policy; None is the model without projection.
        adapter: The policy's directory of a fine-tuned adapter; None is the model without one.
        policy: The policy to score. None: the policy that `subspace`, `strength` and `adapter` describe.
        strength: The policy's strength, from 0 to 1.
        seed: Seed of the draw of items. Completions are greedy and need none.
        max_new_tokens: Token limit; the task's own by default.
        batch_size: Completions at once. None: as many as memory allows.
        name: The name of the policy in results; its own name by default.
        forced: What `teacher_forced` found for this policy on these items, where that is known already.
        path: Keep completions in this JSONL file as they come, so that an interrupted evaluation goes on.
        progress: Whether to show progress bars.
    """
    task = tasks.get(task) if isinstance(task, str) else task
    if not isinstance(task, Task):
        raise SPDError(
            f"evaluate takes a task or the name of one, not a {type(task).__name__}; data of your own is a task as "
            "tasks.get('items.jsonl')"
        )
    n, seed = whole("n", n), whole("seed", seed, least=None)
    policy = Policy.given(policy, subspace, strength, adapter)
    policy = replace(policy, name=name or policy.name)
    pair = pair.dated((recorded_settings(path) or {}).get("prompt_date"))
    items = task.test(n, seed)
    task.check_scorable()
    limit = task.max_new_tokens if max_new_tokens is None else whole("max_new_tokens", max_new_tokens)
    check_room(pair, items, limit)
    if forced is None:
        # items without spans (prompts of one's own) have no gold tokens to measure on
        with_spans = [item for item in items if item.measurable]
        found = teacher_forced(pair, with_spans, [policy], progress=progress) if with_spans else {policy.name: []}
        forced = with_answer_only(pair, task, with_spans, [policy], found, progress=progress)[policy.name]
    choices = {item.id: allowed for item in items if (allowed := task.choices(item))}
    chosen = most_likely(pair, [item for item in items if item.id in choices], choices, policy, progress=progress)
    corpus = generate(
        pair, items, policy=policy, max_new_tokens=limit, temperature=0.0, batch_size=batch_size, path=path,
        progress=progress,
    )  # fmt: skip
    results = _results(task, items, corpus, forced, chosen)
    return EvalResult(policy.name, task.name, results, _settings(pair, task, n, seed, limit, policy, corpus))


def _results(
    task: Task, items: Sequence[Example], corpus: Corpus, forced: Sequence[ForcedItem], chosen: Mapping[str, str]
) -> list[ItemResult]:
    """What was measured of each item, side by side."""
    measured = {item.id: asdict(item) for item in forced}
    return [
        ItemResult(
            prompt=item.prompt,
            gold=item.completion,
            completion=record.completion,
            answer=task.extract(record.completion),
            score=task.score(item, record.completion),
            judged=task.judges(item),  # known once it is scored
            n_tokens=record.n_completion_tokens,
            finish_reason=record.finish_reason,
            choice=chosen.get(item.id),
            choice_score=task.score(item, chosen[item.id]) if item.id in chosen else None,
            **measured.get(item.id, {"id": item.id}),
        )
        for item, record in zip(items, corpus, strict=True)
    ]


def _settings(
    pair: ModelPair, task: Task, n: int, seed: int, limit: int, policy: Policy, corpus: Corpus
) -> dict[str, Any]:
    """What one needs to make the result again."""
    return {
        "model": pair.name,
        "dtype": dtype_name(pair.dtype),
        **pair.format.settings,
        "task_options": task.options(),
        "n": n,
        "seed": seed,
        "max_new_tokens": limit,
        "strength": None if policy.subspace is None else policy.strength,
        **{name: corpus.settings[name] for name in (APPLIED, NOT_APPLIED) if name in corpus.settings},
    }
