"""`generate`: the model's own completions, sampled under a projection (paper section 3.3, Eq. 13)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from spd_lens.corpus import Corpus, CorpusWriter, Key, Record, recorded_settings
from spd_lens.decoding import Decoding, Job, stop_tokens
from spd_lens.engines import lens_engine, twin_engine
from spd_lens.errors import SPDError
from spd_lens.examples import Example, as_examples, id_text
from spd_lens.model_settings import ModelSettings
from spd_lens.models import ModelPair
from spd_lens.models.adapter_files import adapter_digest
from spd_lens.models.fingerprint import weights_digest
from spd_lens.models.neutral import neutrally
from spd_lens.numbers import whole
from spd_lens.projection import check_strength
from spd_lens.sampling import Sampling
from spd_lens.subspace import Subspace

ENGINES = ("twin", "lens")

PerPrompt = Mapping[str, Subspace | None] | Callable[[Example], Subspace | None]
"""Which subspace each prompt is answered under, by its id or by asking; None for none."""


@neutrally
def generate(
    pair: ModelPair,
    prompts: Iterable[str | Example],
    *,
    subspace: Subspace | PerPrompt | None = None,
    strength: float = 1.0,
    adapter: str | Path | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 42,
    engine: str = "twin",
    batch_size: int | None = None,
    samples_per_prompt: int = 1,
    path: str | Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Sample completions (Eq. 13), under the projection where a subspace is given.

    A completion depends on the seed, its prompt's id and its sample number, not on its batch or on interruptions:
    exactly so up to rounding of the logits, which in float32 does not show; in bfloat16 single tokens change with the
    batch size. The models are left as they were.

    What the model's generation config asks for beside temperature, top-p and top-k (a repetition penalty, suppressed
    tokens, stop strings, ...) is applied as `generate` of transformers applies it; what is not (beams, `do_sample:
    false`) is named in the log. The corpus' settings hold both. `pair.hf.generation_config` is read and never written:
    change it to have it otherwise.

    Args:
        pair: The model.
        prompts: Texts or examples (their ids name the records and seed the noise).
        subspace: Keep these directions of the keys and values, at prompt and new tokens alike (Eq. 12). To choose by
            prompt, a mapping from every prompt's id, or a function of the `Example`: prompts of one choice are then
            answered together, and each as if its subspace had been given alone.
        strength: Of the projection, from 0 (none) to 1.
        adapter: Directory of a LoRA adapter or checkpoint to put on meanwhile.
        max_new_tokens: Longest completion, in tokens. Prompt and completion must fit the context.
        temperature: 0 is greedy. None: the model's own generation config, else 0.7.
        top_p: None: the model's own generation config, else 0.95. 1 keeps every token.
        top_k: None: the model's own generation config, else all tokens. 0: all tokens.
        seed: Of the sampling noise.
        engine: `"twin"`: batched on the Hugging Face twin, the projection folded into its weights. `"lens"`: the lens
            model under hooks, one prompt at a time and slow, with the same tokens in float32; compared with the twin at
            the length of the longest prompt and its completion first.
        batch_size: Completions at a time (twin engine); as one ends, the next prompt takes its place. None: as many as
            memory allows, at most 32 on a CPU and 256 on CUDA. Halved by itself where memory runs out.
        samples_per_prompt: How many completions of each prompt.
        path: JSONL file that every finished batch goes to. A run that was interrupted continues from it, also with more
            prompts than before (with a choice by prompt: with the same ones).
        progress: Show a progress bar.

    Returns:
        The completions in prompt order.

    Raises:
        SPDError: no prompts; a prompt that leaves no room for `max_new_tokens`; a parameter out of range; a file at
            `path` from other settings; a full disk (what was written is kept).
    """
    earlier = recorded_settings(path)
    pair = pair.dated((earlier or {}).get("prompt_date"))
    sampling = Sampling.resolve(pair, temperature, top_p, top_k)
    max_new_tokens = whole("max_new_tokens", max_new_tokens)
    samples_per_prompt = whole("samples_per_prompt", samples_per_prompt)
    batch_size = None if batch_size is None else whole("batch_size", batch_size)
    seed = whole("seed", seed, least=None)
    if engine not in ENGINES:
        raise SPDError(f"unknown engine {engine!r}; choose 'twin' (batched, fast) or 'lens' (hooks, one at a time)")
    if engine == "lens" and adapter is not None:
        raise SPDError(
            "the lens engine runs the lens model's own weights; bring the adapter there with "
            "pair.sync(to='lens', adapter=...) and leave adapter out, or use engine='twin'"
        )
    strength = check_strength(strength)
    jobs = _jobs(pair, prompts, samples_per_prompt, max_new_tokens, engine)
    if engine == "lens":  # before its weights are recorded
        pair.lens_at(max(len(job.prompt_ids) for job in jobs) + max_new_tokens)
    groups = _groups(jobs, subspace)
    for group in groups:
        if group.subspace is not None:
            group.subspace.check(pair.hf)  # before a corpus file is begun
    stop_ids = stop_tokens(pair)
    own = ModelSettings.of(pair, sampling, stop_ids)
    decoding = Decoding(sampling, seed, max_new_tokens, stop_ids, own)
    by_prompt = subspace is not None and not isinstance(subspace, Subspace)
    settings = _settings(pair, decoding, engine, groups, by_prompt, strength, adapter)
    if earlier is not None and "prompt_date" not in earlier:
        settings.pop("prompt_date", None)  # written before dates were; the prompts themselves are compared
    order = [job.key for job in jobs]
    own.tell()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(CorpusWriter(path, settings, order)) if path is not None else None
        done = dict(writer.done) if writer is not None else {}
        _refuse_other_prompts(jobs, done)
        bar = stack.enter_context(tqdm(total=len(jobs), initial=len(done), unit="prompt", disable=not progress))
        for group in groups:
            left = [job for job in group.jobs if job.key not in done]
            if not left:
                continue
            with (
                twin_engine(pair, decoding, group.subspace, strength, adapter, batch_size)
                if engine == "twin"
                else lens_engine(pair, decoding, group.subspace, strength)
            ) as run:
                for completions in run(left):
                    records = [_record(pair, job, ids, decoding) for job, ids in completions]
                    if writer is not None:
                        writer.append(records)
                    done |= {record.key: record for record in records}
                    bar.update(len(records))
    return Corpus([done[key] for key in order], settings=settings, path=None if path is None else Path(path))


def check_room(pair: ModelPair, prompts: Iterable[str | Example], max_new_tokens: int) -> None:
    """Raise `SPDError` where `generate` would: a prompt that leaves no room for `max_new_tokens` in the context."""
    _jobs(pair, prompts, 1, whole("max_new_tokens", max_new_tokens), "twin")


@dataclass(frozen=True)
class _Group:
    """Completions under one subspace."""

    subspace: Subspace | None
    digest: str | None
    """Of the subspace."""
    jobs: list[Job]


def _groups(jobs: Sequence[Job], subspace: Subspace | PerPrompt | None) -> list[_Group]:
    """Jobs by the subspace that they are done under, in order of first use."""
    if isinstance(subspace, Mapping):
        subspace = {id_text(id): each for id, each in subspace.items()}
    chosen = {job.example.id: job.example for job in jobs}
    subspaces = {name: _choice(subspace, example) for name, example in chosen.items()}  # asked once for all samples
    # each object is hashed once: thousands of prompts share a few
    distinct = {id(found): found for found in subspaces.values()}
    digests = {key: None if found is None else found.digest() for key, found in distinct.items()}
    groups: dict[str | None, _Group] = {}
    for job in jobs:
        found = subspaces[job.example.id]
        digest = digests[id(found)]
        groups.setdefault(digest, _Group(found, digest, [])).jobs.append(job)
    return list(groups.values())


def _choice(subspace: Subspace | PerPrompt | None, example: Example) -> Subspace | None:
    if subspace is None or isinstance(subspace, Subspace):
        return subspace
    if isinstance(subspace, Mapping):
        if example.id not in subspace:
            raise SPDError(f"no subspace is named for prompt {example.id!r}; name one for every prompt, None for none")
        found: Any = subspace[example.id]
    else:
        found = subspace(example)
    if found is not None and not isinstance(found, Subspace):
        raise SPDError(f"what is chosen for prompt {example.id!r} is {found!r}; it must be a Subspace or None")
    return found


def _settings(
    pair: ModelPair,
    decoding: Decoding,
    engine: str,
    groups: Sequence[_Group],
    by_prompt: bool,
    strength: float,
    adapter: str | Path | None,
) -> dict[str, Any]:
    """What decides a corpus' content: written beside it, and compared when it is continued.

    `batch_size` is not among them, since completions do not depend on it. `subspace` is a digest, or with a choice by
    prompt each prompt's.
    """
    each = {job.example.id: group.digest for group in groups for job in group.jobs}
    return {
        "model": pair.name,
        "engine": engine,
        "dtype": str(pair.dtype).removeprefix("torch."),
        **pair.format.settings,
        "subspace": each if by_prompt else groups[0].digest,
        "strength": float(strength) if any(group.digest for group in groups) else None,
        "adapter": None if adapter is None else adapter_digest(adapter),
        "max_new_tokens": decoding.max_new_tokens,
        **decoding.sampling.to_dict(),
        **decoding.own.settings,
        "stop_ids": list(decoding.stop_ids),
        "seed": decoding.seed,
        # last: the first setting that differs is the one a refusal names
        "fingerprint": pair.fingerprint.to_dict(),
        "weights": weights_digest(pair.hf if engine == "twin" else pair.lens),
    }


def _jobs(
    pair: ModelPair, prompts: Iterable[str | Example], samples: int, max_new_tokens: int, engine: str
) -> list[Job]:
    examples = as_examples(prompts)
    if not examples:
        raise SPDError("there is no prompt to complete; give at least one")
    limit = pair.context(engine)
    jobs = []
    for example in examples:
        ids = pair.prompt_ids(example)
        if len(ids) + max_new_tokens > limit:
            raise SPDError(
                f"prompt {example.id!r} has {len(ids)} tokens, which leaves room for {limit - len(ids)} new ones in "
                f"the context of {limit}, not for {max_new_tokens}; lower max_new_tokens or leave the prompt out "
                "(--too-long drop does, and counts)"
            )
        jobs += [Job(example, sample, ids) for sample in range(samples)]
    return jobs


def _refuse_other_prompts(jobs: Sequence[Job], done: Mapping[Key, Record]) -> None:
    for job in jobs:
        if job.key in done and list(done[job.key].prompt_ids) != job.prompt_ids:
            raise SPDError(
                f"the corpus holds a completion of another text for prompt {job.example.id!r}; give the same prompts "
                "again or another path"
            )


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
