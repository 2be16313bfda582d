"""The engine `openai`: a server that speaks OpenAI's completions protocol, as vLLM, SGLang and transformers do."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.generation.engines.base import Engine, Run
from spd_lens.generation.engines.greedy_probe import GreedyProbe
from spd_lens.generation.engines.registry import register
from spd_lens.generation.engines.server import Answer, Connection, Refused, check_url, connected
from spd_lens.generation.jobs import Completions, Decoding, Job
from spd_lens.generation.model_settings import shown
from spd_lens.generation.sampling import Sampling
from spd_lens.models import row_uniforms
from spd_lens.settings import EngineSettings
from spd_lens.subspaces import Policy

log = logging.getLogger(__name__)

DEFAULT_CONCURRENCY = 32
_SENT = ("repetition_penalty", "min_p", "stop_strings")
"""What a server is asked for of the model's generation config, beside temperature, top-p and top-k."""
_HOT = 2.0
"""A temperature at which sampled tokens are not the greedy ones, and the highest that all servers take."""


@dataclass(frozen=True)
class _Served:
    """The model that is asked, and how."""

    model: str
    ids: bool = True
    """Whether prompts are sent as token ids; else as text, and what decides sampling as transformers has it."""
    shows_ids: bool = True
    """Whether answers hold the ids of their tokens; else their text is tokenised again."""


@register
@dataclass
class OpenAIEngine(Engine):
    """A served model, asked by many requests at a time; greedy tokens are compared with the twin's first.

    The server draws the tokens: a completion is repeated by the same seed on the same server alone.
    """

    name = "openai"
    says = "a model on any server that speaks OpenAI's completions protocol"
    takes = ("engine_url", "engine_model", "engine_concurrency", "engine_timeout", "engine_retries")

    serves_one = True

    served: _Served = field(init=False)

    @classmethod
    def check(cls, settings: EngineSettings) -> None:
        """Also raise `SPDError` without the address of a server."""
        super().check(settings)
        check_url(settings.engine_url)

    def prepare(self, jobs: Sequence[Job], policies: Sequence[Policy]) -> Mapping[str, Any]:
        """Compare the served model with the twin under the policy, and find out how it is asked.

        Raises:
            SPDError: There are several policies, the server is not there or serves another policy, or it does not
                sample as it is asked to.
        """
        if len(policies) > 1:
            raise SPDError(
                f"the engine 'openai' asks one served model, and {len(policies)} subspaces are chosen among; generate "
                "under each of them alone, with the model that it is served as"
            )
        self._refuse_unsent()
        with self._connected() as connection:
            names, software = connection.about()
            self.served = _Served(self._model(names))
            probe = GreedyProbe(self.pair, policies[0], self.decoding, self._seen)
            self._find_form(connection, probe)
            if not self.served.ids:
                for job in jobs:  # all of them now, and not one of them when half are done
                    self._text(job)
            where = f"the model {self.served.model!r} at {connection.url}"
            greedy = self._answered(connection, probe.greedy, probe.jobs)
            probe.check(greedy, where)
            if not self.decoding.sampling.greedy:
                self._check_sampling(connection, where, probe, greedy[probe.jobs[0].key])
        request = self._request(jobs[0], self.decoding)
        sent = {name: request[name] for name in ("temperature", "top_p", "max_tokens")} | request["extra_body"]
        tokens = {
            "prompt": "ids" if self.served.ids else "text",
            "completion": "ids" if self.served.shows_ids else "text",
        }
        log.info(
            "generating with %s (%s), prompts as %s and completions as %s; the server draws the tokens, so that "
            "another one draws others", where, software or "unknown software", tokens["prompt"], tokens["completion"],
        )  # fmt: skip
        return {
            "engine_model": self.served.model,
            "engine_server": software,
            "engine_request": sent,
            "engine_tokens": tokens,
        }

    @contextlib.contextmanager
    def under(self, policy: Policy) -> Iterator[Run]:
        """The server, which `prepare` has compared with the twin under this policy."""
        with self._connected() as connection:
            yield partial(self._complete, connection, self.decoding)

    def _connected(self) -> AbstractContextManager[Connection]:
        settings = self.settings
        return connected(str(settings.engine_url), settings.engine_timeout, settings.engine_retries)

    def _refuse_unsent(self) -> None:
        unsent = {name: value for name, value in self.decoding.own.applied.items() if name not in _SENT}
        if unsent:
            raise SPDError(
                f"the model's generation config sets {shown(unsent)}, for which the engine 'openai' asks no server; "
                "generate with the engine 'twin', or set it back in pair.hf.generation_config"
            )

    def _model(self, names: Sequence[str]) -> str:
        if self.settings.engine_model is not None:
            return self.settings.engine_model
        if len(names) != 1:
            listed = f"has several models ({', '.join(names)})" if names else "lists no model"
            raise SPDError(
                f"the server at {self.settings.engine_url} {listed}; name one in engine_model, or correct engine_url"
            )
        return names[0]

    def _find_form(self, connection: Connection, probe: GreedyProbe) -> None:
        """Token ids where the server takes them, else text; and whether it shows the ids of what it writes."""
        [first, *_] = probe.jobs
        try:
            answer = connection.ask(self._request(first, probe.greedy)).result()
        except Refused as refused:
            self.served = replace(self.served, ids=False)
            try:
                answer = connection.ask(self._request(first, probe.greedy)).result()
            except Refused as error:
                raise error from refused
        self.served = replace(self.served, shows_ids=all(choice.token_ids is not None for choice in answer.choices))

    def _check_sampling(self, connection: Connection, where: str, probe: GreedyProbe, greedy: list[int]) -> None:
        """Refuse a server that does not sample, or that does not cut off where it is asked to."""
        [first, *_] = probe.jobs

        def drawn(top_k: int | None) -> list[list[int]]:
            hot = replace(probe.greedy, sampling=Sampling(_HOT, 1.0, top_k))
            return list(self._answered(connection, hot, [replace(first, sample=n) for n in (0, 1)]).values())

        if all(ids == greedy for ids in drawn(None)):
            raise SPDError(
                f"{where} writes the greedy tokens although it is asked to sample; let it sample, or ask for "
                "temperature 0"
            )
        if self.decoding.sampling.top_k is not None and any(ids != greedy for ids in drawn(1)):
            raise SPDError(
                f"{where} takes no notice of top_k, which is {self.decoding.sampling.top_k}; give top_k 0 to keep "
                "every token, or use another engine"
            )

    def _request(self, job: Job, decoding: Decoding) -> dict[str, Any]:
        """What is sent for one completion."""
        sampling, own = decoding.sampling, decoding.own.applied
        top_k, penalty, min_p = sampling.top_k, own.get("repetition_penalty", 1.0), own.get("min_p", 0.0)
        if self.served.ids:
            extra = {
                "top_k": top_k or -1, "min_p": min_p, "repetition_penalty": penalty,
                "stop_token_ids": list(decoding.stop_ids), "return_token_ids": True,
            }  # fmt: skip
        else:
            config = {
                "do_sample": not sampling.greedy, "top_k": top_k or 0, "repetition_penalty": penalty,
                "eos_token_id": list(decoding.stop_ids), "pad_token_id": self.pair.pad_id,
                **({} if sampling.greedy else {"min_p": min_p or None}),
            }  # fmt: skip
            extra = {"generation_config": json.dumps(config)}
        return {
            "model": self.served.model,
            "prompt": job.prompt_ids if self.served.ids else self._text(job),
            "max_tokens": decoding.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(row_uniforms(decoding.seed, *job.key, 1)[0] * 2**31),
            "extra_body": extra,
        }

    def _text(self, job: Job) -> str:
        """A text that the server's tokenizer, which adds what it adds to any text, makes the prompt's ids of."""
        tokenizer = self.pair.tokenizer
        for ids in (job.prompt_ids, job.prompt_ids[1:]):  # with BOS or without
            text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if list(tokenizer(text)["input_ids"]) == job.prompt_ids:
                return text
        raise SPDError(
            f"{job.example.name} has no text that becomes its {len(job.prompt_ids)} tokens again, and the server at "
            f"{self.settings.engine_url} takes text alone; use a server that takes token ids, or leave the prompt out"
        )

    def _answered(self, connection: Connection, decoding: Decoding, jobs: Sequence[Job]) -> dict[Any, list[int]]:
        return {job.key: ids for done in self._complete(connection, decoding, jobs) for job, ids in done}

    def _complete(self, connection: Connection, decoding: Decoding, jobs: Sequence[Job]) -> Iterator[Completions]:
        """Completions in the order of the answers; a few requests are in flight, and the next waits until one is over.

        Raises:
            SPDError: A request failed for good; those that were in flight with it are waited for, and kept.
        """
        waiting, flying = iter(jobs), dict[Future[Answer], Job]()
        failure: SPDError | None = None
        most = self.settings.engine_concurrency or DEFAULT_CONCURRENCY
        while True:
            if failure is None:
                for job in itertools.islice(waiting, most - len(flying)):
                    flying[connection.ask(self._request(job, decoding))] = job
            if not flying:
                break
            over, _ = wait(flying, return_when=FIRST_COMPLETED)
            done: Completions = []
            for future in over:
                job = flying.pop(future)
                try:
                    done.append((job, self._ids(job, future.result(), decoding)))
                except SPDError as error:
                    failure = failure or error
            if done:
                yield done
        if failure is not None:
            raise failure

    def _ids(self, job: Job, answer: Answer, decoding: Decoding) -> list[int]:
        """The new token ids of an answer, through the token or the text that ends them.

        Raises:
            SPDError: It is no answer to what was asked.
        """
        if len(answer.choices) != 1:
            raise self._odd(job, f"{len(answer.choices)} completions, not one")
        [choice] = answer.choices
        n_read = len(job.prompt_ids) if answer.usage is None else answer.usage.prompt_tokens
        if n_read != len(job.prompt_ids) or choice.prompt_token_ids not in (None, job.prompt_ids):
            raise self._odd(job, f"a completion of another prompt (of {n_read} tokens, not {len(job.prompt_ids)})")
        if choice.finish_reason not in ("stop", "length"):
            raise self._odd(job, f"a completion that ended with {choice.finish_reason!r}")
        ids = choice.token_ids if choice.token_ids is not None else self._retokenised(choice.text)
        n_rows = self.pair.hf.get_input_embeddings().weight.shape[0]
        if foreign := next((id for id in ids if not 0 <= id < n_rows), None):
            raise self._odd(job, f"the token {foreign}, which is not among the model's {n_rows}")
        ids = self._through_its_end(job, ids, stopped=choice.finish_reason == "stop")
        if choice.finish_reason == "stop" or decoding.reason(job, ids) != "length":
            return ids
        n_new = len(ids) if choice.token_ids is not None else answer.usage and answer.usage.completion_tokens
        if not ids:
            raise self._odd(job, "a completion without a token")
        if n_new not in (None, decoding.max_new_tokens):
            raise self._odd(job, f"a completion cut at {n_new} tokens, not {decoding.max_new_tokens}")
        return ids

    def _odd(self, job: Job, what: str) -> SPDError:
        return SPDError(
            f"the server at {self.settings.engine_url} answered {job.example.name} with {what}; what was written is "
            "kept, and the same again continues once the server is right"
        )

    def _through_its_end(self, job: Job, ids: list[int], *, stopped: bool) -> list[int]:
        """A completion cut behind the first token that ends it; `stopped`: there is one, though it may not be shown."""
        for end in range(1, len(ids) + 1):
            if self.decoding.reason(job, ids[:end]) != "length":
                return ids[:end]
        return [*ids, self._stop_token] if stopped else ids

    @cached_property
    def _stop_token(self) -> int:
        """What ends a completion where a server does not show it: the chat's end of turn, else EOS."""
        ends = (self.pair.format.end_of_turn(), self.pair.tokenizer.eos_token_id, *self.decoding.stop_ids)
        return int(next(id for id in ends if id is not None))

    def _retokenised(self, text: str) -> list[int]:
        return list(self.pair.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _seen(self, job: Job, ids: list[int]) -> list[int]:
        """The twin's completion as this server would show it."""
        if self.served.shows_ids:
            return ids
        stopped = ids[-1] in self.decoding.stop_ids
        text = self.pair.tokenizer.decode(
            ids[:-1] if stopped else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return self._through_its_end(job, self._retokenised(text), stopped=stopped)
