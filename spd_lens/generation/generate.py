"""`generate`: the model's own completions, sampled under a projection (paper section 3.3, Eq. 13)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from spd_lens.errors import SPDError, whole
from spd_lens.examples import Example, as_examples, id_text
from spd_lens.generation import engines
from spd_lens.generation.corpus import Corpus, CorpusWriter, Key, Record, recorded_settings
from spd_lens.generation.jobs import Decoding, Job
from spd_lens.models import ModelPair, adapter_digest, dtype_name, neutrally, weights_digest
from spd_lens.output import progress_bar
from spd_lens.settings import EngineSettings, SamplingKeywords, SamplingSettings
from spd_lens.subspaces import Policy, Subspace

PerPrompt = Mapping[str, Subspace | None] | Callable[[Example], Subspace | None]
"""Which subspace each prompt is answered under, by its id or by asking; None for none."""


@neutrally
def generate(
    pair: ModelPair,
    prompts: Iterable[str | Example],
    *,
    policy: Policy | None = None,
    settings: SamplingSettings | None = None,
    subspace: Subspace | PerPrompt | None = None,
    strength: float = 1.0,
    adapter: str | Path | None = None,
    engine: str | None = None,
    engine_settings: EngineSettings | None = None,
    path: str | Path | None = None,
    progress: bool = True,
    **keywords: Unpack[SamplingKeywords],
) -> Corpus:
    """Sample completions under a policy (Eq. 13).

    A completion depends on the seed, its prompt's id and its sample number, not on its batch or on interruptions:
    exactly so up to rounding of the logits, which in float32 does not show; in bfloat16 single tokens change with the
    batch size. The models are left as they were.

    What the model's generation config asks for beside temperature, top-p and top-k (a repetition penalty, suppressed
    tokens, stop strings, ...) is applied as `generate` of transformers applies it; what is not (beams, `do_sample:
    false`) is named in the log. The corpus' settings hold both. `pair.hf.generation_config` is read and never written:
    change it to have it otherwise.

    Args:
        pair: The model pair.
        prompts: Texts or examples (their ids name the records and seed the noise).
        policy: The policy to generate under. None: the policy that `subspace`, `strength` and `adapter` describe.
        settings: Settings of the sampling. None: the defaults of `SamplingSettings`.
        subspace: The subspace of the policy; or a choice by prompt, as a mapping from every prompt's id or a function
            of the `Example`: prompts of one choice are answered together, each as if its subspace were given alone.
        strength: The policy's strength.
        adapter: The policy's adapter or checkpoint.
        engine: `"twin"`: batched on the Hugging Face twin, the projection folded into its weights. `"lens"`: the lens
            model under hooks, one prompt at a time and slow, with the same tokens in float32. Others are in
            docs/engines.md. None: the one that `engine_settings` names, by default the twin.
        engine_settings: Settings of the engine, which refuses those that it does not read.
        path: JSONL file that every finished batch goes to. A run that was interrupted continues from it, also with more
            prompts than before (with a choice by prompt: with the same ones).
        progress: Whether to show a progress bar.
        **keywords: Single settings, which take precedence over `settings`: max_new_tokens, temperature, top_p, top_k,
            batch_size, samples_per_prompt, seed, max_prompt_tokens. See `spd_lens.settings.SamplingSettings`.

    Returns:
        The completions in prompt order.

    Raises:
        SPDError: No prompts; one without room for `max_new_tokens`; a setting out of range; a file at `path` from other
            settings; an engine that does not run the policy; a full disk (what was written is kept).
    """
    (settings := SamplingSettings.given(settings, keywords, "generate")).check()
    policy = Policy.given(policy, subspace, strength, adapter)
    kind, engine_settings = engines.chosen(engine, engine_settings)
    earlier = recorded_settings(path)
    pair = pair.dated((earlier or {}).get("prompt_date"))
    decoding = Decoding.of(pair, settings)
    jobs = _jobs(pair, prompts, settings, kind.runs)
    groups = _groups(pair, jobs, policy)
    runs = kind(pair, decoding, engine_settings, settings.generation_batch_size)
    decoding.own.tell()
    own = runs.prepare(jobs, [group.policy for group in groups])  # before a lens model's weights are recorded
    by_prompt = not isinstance(policy.subspace, Subspace | None)
    recorded = {**_recorded(runs, own, groups, by_prompt=by_prompt), **settings.label}
    if earlier is not None and "prompt_date" not in earlier:
        recorded.pop("prompt_date", None)  # written before dates were; the prompts themselves are compared
    with CorpusWriter(path, recorded, [job.key for job in jobs]) if path else contextlib.nullcontext() as writer:
        done = _complete(runs, groups, writer, progress)
    return Corpus([done[job.key] for job in jobs], settings=recorded, path=None if path is None else Path(path))


def _complete(
    engine: engines.Engine, groups: Sequence[_Group], writer: CorpusWriter | None, progress: bool
) -> dict[Key, Record]:
    """The records of all jobs: those that the corpus file has already, and new ones, which are written to it."""
    jobs = [job for group in groups for job in group.jobs]
    done = {} if writer is None else dict(writer.done)
    for job in jobs:
        if job.key in done and list(done[job.key].prompt_ids) != job.prompt_ids:
            raise SPDError(
                f"the corpus holds a completion of another text for prompt {job.example.id!r}; give the same prompts "
                "again or another path"
            )
    with progress_bar(progress, total=len(jobs), initial=len(done), unit="prompt") as bar:
        for group in groups:
            left = [job for job in group.jobs if job.key not in done]
            if not left:
                continue
            with engine.under(group.policy) as run:
                for completions in run(left):
                    records = [_record(engine.pair, job, ids, engine.decoding) for job, ids in completions]
                    if writer is not None:
                        writer.append(records)
                    done |= {record.key: record for record in records}
                    bar.update(len(records))
    return done


def check_room(
    pair: ModelPair, prompts: Iterable[str | Example], max_new_tokens: int, max_prompt_tokens: int | None = None
) -> None:
    """Raise `SPDError` where `generate` would: a prompt that leaves no room for `max_new_tokens` in the context."""
    room = {"max_new_tokens": whole("max_new_tokens", max_new_tokens), "max_prompt_tokens": max_prompt_tokens}
    _jobs(pair, prompts, SamplingSettings.given(None, room, "check_room"), "twin")


@dataclass(frozen=True)
class _Group:
    """Completions under one policy."""

    policy: Policy
    digest: str | None
    """The digest of its subspace."""
    jobs: list[Job]


def _groups(pair: ModelPair, jobs: Sequence[Job], policy: Policy) -> list[_Group]:
    """Jobs by the policy that they are done under, in order of first use; another model's subspace is refused."""
    choice: Any = policy.subspace
    if isinstance(choice, Mapping):
        choice = {id_text(id): each for id, each in choice.items()}
    examples = {job.example.id: job.example for job in jobs}
    subspaces = {id: _chosen(choice, each) for id, each in examples.items()}  # asked once for all samples
    # each object is hashed once: thousands of prompts share a few
    distinct = {id(found): found for found in subspaces.values()}
    digests = {key: None if found is None else found.digest() for key, found in distinct.items()}
    groups: dict[str | None, _Group] = {}
    for job in jobs:
        found = subspaces[job.example.id]
        digest = digests[id(found)]
        if digest not in groups:
            if found is not None:
                found.check(pair.hf)
            groups[digest] = _Group(replace(policy, subspace=found), digest, [])
        groups[digest].jobs.append(job)
    return list(groups.values())


def _chosen(choice: Subspace | PerPrompt | None, example: Example) -> Subspace | None:
    if choice is None or isinstance(choice, Subspace):
        return choice
    if isinstance(choice, Mapping):
        if example.id not in choice:
            raise SPDError(f"no subspace is named for prompt {example.id!r}; name one for every prompt, None for none")
        found: Any = choice[example.id]
    else:
        found = choice(example)
    if found is not None and not isinstance(found, Subspace):
        raise SPDError(f"what is chosen for prompt {example.id!r} is {found!r}; it must be a Subspace or None")
    return found


def _recorded(
    engine: engines.Engine, own: Mapping[str, Any], groups: Sequence[_Group], *, by_prompt: bool
) -> dict[str, Any]:
    """What decides a corpus' content: written beside it, and compared when it is continued.

    `batch_size` is not among them, since completions do not depend on it. `subspace` is a digest, or with a choice by
    prompt each prompt's. `own` is what the engine records of itself.
    """
    pair, decoding = engine.pair, engine.decoding
    each = {job.example.id: group.digest for group in groups for job in group.jobs}
    policy = groups[0].policy  # they differ in their subspace alone
    return {
        "model": pair.name,
        "engine": engine.name,
        **own,
        "dtype": dtype_name(pair.dtype),
        **pair.format.settings,
        "subspace": each if by_prompt else groups[0].digest,
        "strength": float(policy.strength) if any(group.digest for group in groups) else None,
        "adapter": None if policy.adapter is None else adapter_digest(policy.adapter),
        "max_new_tokens": decoding.max_new_tokens,
        **({} if decoding.max_prompt_tokens is None else {"max_prompt_tokens": decoding.max_prompt_tokens}),
        **decoding.sampling.to_dict(),
        **decoding.own.settings,
        "stop_ids": list(decoding.stop_ids),
        "seed": decoding.seed,
        # last: the first setting that differs is the one a refusal names
        "fingerprint": pair.fingerprint.to_dict(),
        "weights": weights_digest(pair.hf if engine.runs == "twin" else pair.lens),
    }


def _jobs(pair: ModelPair, prompts: Iterable[str | Example], settings: SamplingSettings, engine: str) -> list[Job]:
    max_new_tokens = settings.max_new_tokens
    examples = as_examples(prompts)
    if not examples:
        raise SPDError("there is no prompt to complete; give at least one")
    limit = pair.context(engine)
    jobs = []
    for example in examples:
        ids = pair.prompt_ids(example, settings.max_prompt_tokens)
        if len(ids) + max_new_tokens > limit:
            raise SPDError(
                f"prompt {example.id!r} has {len(ids)} tokens, which leaves room for {limit - len(ids)} new ones in "
                f"the context of {limit}, not for {max_new_tokens}; lower max_new_tokens or leave the prompt out "
                "(--too-long drop does, and counts)"
            )
        jobs += [Job(example, sample, ids) for sample in range(settings.samples_per_prompt)]
    return jobs


def _record(pair: ModelPair, job: Job, ids: list[int], decoding: Decoding) -> Record:
    text = ids[:-1] if ids[-1] in decoding.stop_ids else ids  # not every token that ends a turn is a special one
    return Record(
        id=job.example.id,
        prompt=job.example.prompt,
        completion=pair.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        prompt_ids=tuple(job.prompt_ids),
        completion_ids=tuple(ids),
        finish_reason=decoding.reason(job, ids),
        sample=job.sample,
    )
