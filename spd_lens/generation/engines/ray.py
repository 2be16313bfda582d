"""The engine `ray`: the twin in several processes of a Ray cluster, each with a model of its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from spd_lens.errors import SPDError, one_line
from spd_lens.generation.engines.base import Engine, Run
from spd_lens.generation.engines.registry import register
from spd_lens.generation.engines.twin import TwinEngine
from spd_lens.generation.jobs import Completions, Decoding, Job
from spd_lens.generation.model_settings import ModelSettings
from spd_lens.generation.record import Key
from spd_lens.models import ModelPair, PromptFormat, adapter_digest, dtype_name, load, weights_digest
from spd_lens.settings import EngineSettings
from spd_lens.subspaces import Policy

WORKERS = 2
RETRIES = 5
_CHUNKS_PER_WORKER = 4
"""So many that workers of unequal speed end at about the same time."""
_MOST_AT_A_TIME = 256
"""Completions of a chunk at most: what a lost worker costs, and how long the corpus file waits."""


@register
class RayEngine(Engine):
    """The twin's completions, computed by the workers of a Ray cluster, which hold one chunk of the prompts each."""

    name = "ray"
    says = "the twin in several processes of a Ray cluster"
    takes = ("engine_url", "engine_workers", "engine_retries")

    def prepare(self, jobs: Sequence[Job], policies: Sequence[Policy]) -> Mapping[str, Any]:
        """Refuse to begin without Ray. Nothing else decides the content: the completions are those of the twin."""
        _ray()
        return {}

    @contextlib.contextmanager
    def under(self, policy: Policy) -> Iterator[Run]:
        """Workers that hold the twin under the policy; they are gone afterwards, and so is a cluster started here."""
        ray, n = _ray(), self.settings.engine_workers or WORKERS
        retries = RETRIES if self.settings.engine_retries is None else self.settings.engine_retries
        gpus = {"num_gpus": 1} if self.pair.device.type == "cuda" else {}
        with _cluster(ray, self.settings.engine_url, n, **gpus):
            actor = ray.remote(
                num_cpus=1, max_restarts=retries, max_task_retries=retries, scheduling_strategy="SPREAD", **gpus
            )(Worker)
            recipe = ray.put(Recipe.of(self.pair, self.decoding, policy, self.batch_size))
            workers = [actor.remote(recipe) for _ in range(n)]
            try:
                yield partial(_spread, ray, workers, retries)
            finally:
                for worker in workers:
                    ray.kill(worker)


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to become what the process that asks it is; small enough to be sent."""

    model: str
    dtype: str
    device: str
    format: PromptFormat
    """Without its tokenizer: a worker reads its own."""
    generation_config: Any
    decoding: Decoding
    """Without what follows from the generation config, which holds functions of the model."""
    policy: Policy
    batch_size: int | None
    identity: Mapping[str, str]
    """What must be the same in the worker."""

    @classmethod
    def of(cls, pair: ModelPair, decoding: Decoding, policy: Policy, batch_size: int | None) -> Recipe:
        """The recipe of the pair at hand."""
        return cls(
            pair.name, dtype_name(pair.dtype), pair.device.type, replace(pair.format, tokenizer=None),
            pair.hf.generation_config, replace(decoding, own=ModelSettings()), policy, batch_size,
            identity(pair, policy),
        )  # fmt: skip


class Worker:
    """One process of the cluster. It reads the model with its first chunk and keeps it under the policy."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.open = contextlib.ExitStack()  # never closed: the process ends with it

    @cached_property
    def pair(self) -> ModelPair:
        """The model pair; `SPDError` that names what is not as it is in the process that asks."""
        recipe = self.recipe
        pair = load(recipe.model, dtype=recipe.dtype, device=recipe.device)
        for name, own in identity(pair, recipe.policy).items():
            if own != recipe.identity[name]:
                raise SPDError(
                    f"the Ray worker on {platform.node()} has {name} {own}, not {recipe.identity[name]}; give every "
                    "node the same spd_lens and its packages, and the same model and adapter under the same path"
                )
        pair.format = replace(recipe.format, tokenizer=pair.tokenizer)
        pair.hf.generation_config = recipe.generation_config
        return pair

    @cached_property
    def run(self) -> Run:
        """The twin engine under the policy."""
        given = self.recipe.decoding
        decoding = replace(given, own=ModelSettings.of(self.pair, given.sampling, given.stop_ids))
        engine = TwinEngine(self.pair, decoding, EngineSettings.model_validate({}), self.recipe.batch_size)
        return self.open.enter_context(engine.under(self.recipe.policy))

    def complete(self, jobs: Sequence[Job]) -> dict[Key, list[int]]:
        """New token ids by job; `SPDError` for a prompt that is made of other tokens here."""
        for job in jobs:
            if self.pair.prompt_ids(job.example, self.recipe.decoding.max_prompt_tokens) != job.prompt_ids:
                raise SPDError(
                    f"the tokenizer on {platform.node()} reads prompt {job.example.id!r} otherwise; give every node "
                    "the same model directory"
                )
        return {job.key: ids for completions in self.run(jobs) for job, ids in completions}


def identity(pair: ModelPair, policy: Policy) -> dict[str, str]:
    """What two processes must share to write one corpus, by the name that a refusal calls it."""
    package = Path(__file__).parents[2]
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return {
        "spd_lens": importlib.metadata.version("spd-lens"),
        "code": code.hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fingerprint": pair.fingerprint.digest(),
        "weights": weights_digest(pair.hf),
        "adapter": "none" if policy.adapter is None else adapter_digest(policy.adapter),
    }


def _spread(ray: Any, workers: Sequence[Any], retries: int, jobs: Sequence[Job]) -> Iterator[Completions]:
    """Complete jobs chunk by chunk: one is with each worker, and the next is sent when an answer comes.

    Ray gives the chunk of a process that died to the one that takes its place, and hands on one answer.
    """
    from ray.util.actor_pool import ActorPool

    by_key = {job.key: job for job in jobs}
    size = min(_MOST_AT_A_TIME, math.ceil(len(jobs) / (_CHUNKS_PER_WORKER * len(workers))))
    chunks = [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]
    answers = ActorPool(list(workers)).map_unordered(lambda worker, chunk: worker.complete.remote(chunk), chunks)
    try:
        for answer in answers:
            yield [(by_key[key], ids) for key, ids in answer.items()]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SPDError):
            raise SPDError(str(error.cause)) from error
        raise
    except ray.exceptions.RayActorError as error:
        raise SPDError(
            f"a Ray worker was lost for good after {retries} restarts (out of memory, or its node is gone); what was "
            "written is kept: run the same again to continue, with a smaller batch_size or fewer engine_workers"
        ) from error


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None, workers: int, num_gpus: int = 0) -> Iterator[None]:
    """The cluster at an address, `"local"` for one that lives here and now; the one that is open already, if any.

    Raises:
        SPDError: No cluster answers there, or it is too small for the workers.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            here = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, logging_level=logging.WARNING, log_to_driver=False, **here)
            except Exception as error:  # Ray itself raises no narrower one
                raise SPDError(
                    f"no Ray cluster answers at {address!r} ({one_line(error)}); start one with 'ray start --head', or "
                    "leave engine_url out for workers on this machine"
                ) from error
            stack.callback(ray.shutdown)
        there = ray.cluster_resources()
        for kind, each in {"CPU": 1, "GPU": num_gpus}.items():
            if there.get(kind, 0) < workers * each:
                raise SPDError(
                    f"the Ray cluster has {there.get(kind, 0):g} {kind}s, and {workers} workers need one each; lower "
                    "engine_workers"
                )
        yield


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    try:
        import ray
    except ImportError as error:
        raise SPDError("the engine 'ray' needs the package ray; pip install 'spd-lens[cluster]'") from error
    return ray
