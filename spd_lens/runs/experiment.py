"""`Experiment`: settings, model, tasks and a folder; what is made of them is made once, checked, and kept."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from spd_lens import estimators
from spd_lens.errors import SPDError
from spd_lens.evaluation import EvalResult, ForcedItem, ForcedPasses, evaluate, teacher_forced, with_answer_only
from spd_lens.examples import Example
from spd_lens.generation import Corpus, engines, generate
from spd_lens.models import Loss, ModelPair, weights_digest
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.context_limit import fitted
from spd_lens.runs.extractions import InHand, Layers, Request
from spd_lens.runs.guardrails import check_corpus, check_halves, check_policy
from spd_lens.runs.loading import OF_THE_PAIR, Tasks, load_pair, make_tasks
from spd_lens.runs.run_dir import Run, environment
from spd_lens.subspaces import GradientMoments, Policy, Subspace, extract, shuffled_answers
from spd_lens.tasks import Task
from spd_lens.training import finetune

log = logging.getLogger(__name__)


class Experiment:
    """What a run, a cell of a study, a round, an analysis and the live app work with, and what a method is given.

    Model and tasks are loaded when they are first asked for. Each stage of SPD is one function here, with the settings
    of `config`: whoever calls it says under which policy it is done and where the result belongs.
    """

    def __init__(
        self,
        config: SPDConfig,
        path: str | Path,
        *,
        pair: ModelPair | None = None,
        tasks: Tasks | None = None,
        progress: bool = False,
        shared: bool = False,
        answer_tokens: int | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        """Loads nothing.

        Args:
            config: All settings; `config.seed` is the seed of sampling, training and controls.
            path: The folder in which artefacts are kept.
            pair: A pair that is already loaded; None: the one that the settings name.
            tasks: Source and targets that are already made; None: those that the settings name.
            progress: Show progress bars.
            shared: Whether other settings keep their extractions in the same folder, so that file names say the loss.
            answer_tokens: Token limit of an answer in evaluation; None: the task's own.
            keep: What every extraction keeps beside what it is asked for, so that one pass serves all that follows.
        """
        self.keep = tuple(keep)
        self.config, self.path, self.progress = config, Path(path), progress
        self.shared, self.answer_tokens = shared, answer_tokens
        self.begun: Run | None = None
        """The run whose model and data these must be; None where that is checked elsewhere."""
        self._loaded: dict[Path, GradientMoments] = {}
        self._halved: set[int] = set()
        """Those of `_loaded` whose halves were compared: once is enough for all methods that use them."""
        self.models: dict[str, ModelPair] = {}
        """Pairs that were loaded, by the settings that decide them; several experiments may share it."""
        self._given = pair
        if tasks is not None:
            self.made = tasks

    @classmethod
    def opened(cls, run: Run, *, pair: ModelPair | None = None, progress: bool = True) -> Experiment:
        """The experiment that a run directory was made by. Its model is refused if its weights have changed since."""
        experiment = cls(run.config, run.path, pair=pair, progress=progress)
        experiment.begun = run
        return experiment

    def varied(self, **changes: Any) -> Experiment:
        """The same experiment with other attributes; the model, the tasks and extractions in memory are shared."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def with_seed(self, seed: int) -> Experiment:
        """The same experiment with another seed of sampling, training and controls."""
        return self.varied(config=self.config.model_copy(update={"seed": seed}))

    @cached_property
    def pair(self) -> ModelPair:
        """The model."""
        key = repr([getattr(self.config, name) for name in OF_THE_PAIR])
        pair = self._given or self.models.get(key) or load_pair(self.config)
        if self.begun is None:
            return pair
        pair = self.models[key] = self.begun.dated(pair)
        if self.begun.notes.get("weights") not in (None, weights_digest(pair.hf)):
            raise SPDError(
                f"{pair.name} no longer has the weights that {self.path} was made with; analyse it with the "
                "model it was run on"
            )
        return pair

    @cached_property
    def made(self) -> Tasks:
        """The tasks as their data sets hold them, whatever fits into the model. No model is needed for them."""
        return make_tasks(self.config)

    @cached_property
    def tasks(self) -> Tasks:
        """The tasks without the texts that are beyond the model's context, where the settings ask for that."""
        source, targets = self.made
        if self.config.too_long == "error":  # what fits depends on the model, which not every analysis reads
            return source, targets
        fit = {id(t): fitted(t, self.pair, self.config, self.answer_tokens) for t in (source, *targets.values())}
        return fit[id(source)], {name: fit[id(task)] for name, task in targets.items()}

    @property
    def task(self) -> Task:
        """The source task."""
        return self.tasks[0]

    @property
    def targets(self) -> dict[str, Task]:
        """The tasks to evaluate on, by the names that their results are kept under."""
        return self.tasks[1]

    @property
    def seed(self) -> int:
        """The seed of sampling, training and controls."""
        return self.config.seed

    @cached_property
    def calibrated(self) -> Task:
        """The source task with the spans that calibration examples are to have. Items and prompts keep their own."""
        return self.task.spanned(self.config.span)

    @property
    def calibration(self) -> list[Example]:
        """The worked examples. They depend on `data_seed` and not on `seed`: all seeds see the same."""
        return self.calibrated.calibration(self.config.n_calibration, self.config.data_seed)

    @property
    def prompts(self) -> list[Example]:
        """The training prompts."""
        return self.task.train(self.config.n_train, self.config.data_seed)

    def items(self, target: str, n: int | None = None) -> list[Example]:
        """Test items of a target that can be measured teacher-forced: those with spans, of `n` that are drawn."""
        drawn = self.targets[target].test(n or self.config.n_test(target), self.config.data_seed)
        return [item for item in drawn if item.measurable]

    def extract(
        self,
        examples: Sequence[Example] | None = None,
        *,
        loss: Loss | None = None,
        layers: Layers = None,
        keep: Sequence[str] = (),
        sinks: str = "first",
        labels: str = "gold",
    ) -> GradientMoments:
        """Gradient moments of the calibration examples, or of others (Eq. 6-8), anew: see `moments`.

        They keep what `keep` names, and what the experiment keeps anyway.
        """
        kept = [*keep, *self.kept]
        request = Request(loss or self.config.loss, layers, False, self.seed, kept, sinks, labels)
        return self._extract(request, self.calibration if examples is None else examples)

    def _extract(self, request: Request, examples: Sequence[Example]) -> GradientMoments:
        log.info("extracting gradients of %d calibration examples", len(examples))
        settings = request.settings(self.config.extraction)
        return extract(self.pair, examples, settings=settings, progress=self.progress)

    @property
    def kept(self) -> list[str]:
        """What extractions keep beside the plain sums: what `keep` names, and what the config's estimator reads."""
        return [*self.keep, *estimators.get(self.config.estimator).needs.get("keep", ())]

    def moments(
        self,
        *,
        loss: Loss | None = None,
        layers: Layers = None,
        shuffled: bool = False,
        seed: int | None = None,
        keep: Sequence[str] = (),
        sinks: str = "first",
        labels: str = "gold",
    ) -> GradientMoments:
        """Gradient moments of the calibration examples, extracted on first use and kept in the folder.

        An extraction that is there serves where it keeps as much as is asked for, or more.

        Args:
            loss: `"aligned"` or `"full"`; None: the config's.
            layers: `"all"`, or None for the config's.
            shuffled: With the answers permuted between the examples.
            seed: Seed of the permutation and of sampled labels; None: the config's.
            keep: What is kept beside the plain sums, such as `["classes", "cross"]`.
            sinks: As in `extract`.
            labels: As in `extract`.

        Raises:
            SPDError: the folder holds an extraction of another model, of other sites, of another number of examples or
                of texts that were written, scored or cut in another way; or it lacks what is asked for, and the model
                or the data are not there.
        """
        request = Request(
            loss or self.config.loss, layers, shuffled, self.seed if seed is None else seed, keep, sinks, labels
        )

        def examples() -> list[Example]:
            if not shuffled:
                return self.calibration
            # with a longer answer than its own, an example may no longer fit
            return self.calibrated.kept("calibration", shuffled_answers(self.calibration, request.seed))

        places = request.places(self.path, None if self.shared else self.config.loss)
        path, moments = request.found(places, self._loaded)
        if moments is None:
            # a file beside the first is there for what the first lacks
            more = self.kept if path == places[0] and not layers else []
            self._make(path, replace(request, keep=[*request.keep, *more]), examples)
            moments = GradientMoments.load(path)
        if not shuffled:  # there is one of these for each seed, which is used once
            self._loaded[path] = moments
        if self.begun is None:  # a run's own were checked when it was made, and need neither model nor data to be read
            request.check(moments, path, self.pair, self.config.extraction, len(examples()))
        return moments

    def _make(self, path: Path, request: Request, examples: Callable[[], Sequence[Example]]) -> None:
        try:
            self._extract(request, examples()).save(path)
        except SPDError as error:
            if self.begun is None or not (wanted := ",".join(request.keep)):
                raise
            raise SPDError(
                f"{self.path} has no moments with {wanted}, and they cannot be extracted here: {error}; where model "
                f"and data are, spd-lens extract --keep {wanted} makes them"
            ) from error

    def gradients(
        self, *, keep: Sequence[str] = (), sinks: str = "first", labels: str = "gold", shuffled: bool = False
    ) -> GradientMoments:
        """`moments`, as estimators ask for them."""
        return self.moments(keep=keep, sinks=sinks, labels=labels, shuffled=shuffled)

    def subspace(
        self,
        moments: GradientMoments | None = None,
        *,
        estimator: str | None = None,
        of: str = "gradient",
        others: estimators.Source | None = None,
    ) -> Subspace:
        """The subspace of the config's shape, as the estimator takes it (the paper's: Eq. 9-11).

        Args:
            moments: What it is taken from; None: what the folder holds, and what is extracted where it lacks something.
            estimator: The estimator's name; None: the config's.
            of: `"activation"`, as a control: the top directions of the activations, by no estimator.
            others: Where gradients come from that the estimator reads besides given moments; None: that is an error.

        Raises:
            SPDError: the estimator reads something that the given moments do not hold, or takes no such shape.
        """
        if of != "gradient":
            found = (moments or self.moments()).subspace(**asdict(self.config.shape), of=of)
        else:
            source = self if moments is None else InHand(self, moments, others)
            found = estimators.get(estimator or self.config.estimator).subspace(source, self.config.shape)
        if moments is not None or self.begun:
            return found  # of what the moments are of, only the caller knows; of a run, model and data may be away
        if of == "gradient" and id(own := self.moments()) not in self._halved:
            self._halved.add(id(own))
            check_halves(own, found)
        return replace(found, provenance=self.provenance())

    def provenance(self) -> dict[str, Any]:
        """What `Subspace.provenance` says of a subspace of the calibration examples: what is known of model, data and
        settings, and nothing else. Paths on this machine are no part of it, since subspaces travel."""
        config, hf = self.config, self.pair.hf
        known = {
            "model": named_abroad(config.model),
            "revision": getattr(hf.config, "_commit_hash", None),
            "weights": weights_digest(hf),
            "protocol": config.protocol,
            "task": named_abroad(config.task),
            "task_options": {key: value for key, value in config.task_options.items() if key != "path"},
            "data": self.task.sources(),
            "examples": examples_digest(self.calibration),
            "data_seed": config.data_seed,
            "span": config.span,
            "span_rule": self.pair.format.span_rule,
            "prompt_format": self.pair.format.name,
            "versions": environment()["versions"],
        }
        return {name: value for name, value in known.items() if value not in (None, {})}

    def generate(
        self,
        path: Path | None,
        policy: Policy | None = None,
        prompts: Iterable[Example] | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        engine: str | None = None,
        saved: Path | None = None,
    ) -> Corpus:
        """Completions of the training prompts, or of others, under a policy (Eq. 12-13); an interrupted file goes on.

        Args:
            path: The JSONL file; None: the completions are not kept.
            policy: What to generate under; None: the model as it is.
            prompts: None: all training prompts.
            sampling: `temperature`, `top_p` and `top_k`, where they are not the config's.
            engine: `"twin"` (folded weights), `"lens"` (hooks) or another; None: the config's, with its settings.
            saved: The file of the policy's subspace, to name it where a server does not serve the policy.
        """
        if policy is not None:
            check_policy(self.pair, policy)
        settings = self.config.sampling
        if sampling is not None:
            settings = settings.model_copy(update={key: sampling.get(key) for key in ("temperature", "top_p", "top_k")})
        try:
            return generate(
                self.pair, self.prompts if prompts is None else prompts, policy=policy, settings=settings,
                engine=engine, engine_settings=None if engine else self.config.engine_settings,
                path=path, progress=self.progress,
            )  # fmt: skip
        except engines.OtherPolicy as error:
            raise SPDError(str(error).replace("SUBSPACE", str(saved or "SUBSPACE"))) from error

    def finetune(
        self, corpus: Corpus, out: Path, *, training: Mapping[str, Any] | None = None, parallel: bool = False
    ) -> Path:
        """An adapter, or a whole checkpoint, trained on a corpus (Eq. 14).

        Args:
            corpus: The completions.
            out: Where the adapter belongs.
            training: Fields of `TrainingSettings`, where they are not the config's.
            parallel: Whether this process is one of several that train together.
        """
        check_corpus(corpus)
        settings = self.config.training.model_copy(update=training)
        return finetune(
            self.pair, corpus, settings=settings, out=out, progress=self.progress, report_to=self.config.report_to,
            parallel=parallel,
        )  # fmt: skip

    def measure(
        self,
        items: Sequence[Example],
        policies: Sequence[Policy],
        target: str | None = None,
        *,
        passes: ForcedPasses | None = None,
    ) -> dict[str, list[ForcedItem]]:
        """Teacher-forced outcomes of policies on held-out items, by the policy's name.

        Args:
            items: Held-out items.
            policies: The policies.
            target: The target whose items they are; its answers are then also asked for without reasoning.
            passes: As for `teacher_forced`, where the same items are measured more than once.
        """
        how: dict[str, Any] = {"passes": passes, "progress": self.progress}
        found = teacher_forced(self.pair, items, policies, **how)
        if target is None:
            return found
        return with_answer_only(self.pair, self.targets[target], items, policies, found, **how)

    def score(
        self,
        target: str,
        policy: Policy,
        path: Path,
        *,
        n: int | None = None,
        completions: Path | None = None,
        forced: Sequence[ForcedItem] | None = None,
    ) -> EvalResult:
        """Greedy completions of a target's test items under a policy, with their scores, into a file.

        Args:
            target: The name that the target's results are kept under.
            policy: The policy.
            path: The file of the result.
            n: Number of test items; None: the config's.
            completions: A JSONL file that keeps completions as they come, so that an interrupted evaluation goes on.
            forced: What `measure` found for the policy on these items, if it is known.
        """
        config = self.config
        result = evaluate(
            self.pair, self.targets[target], n or config.n_test(target), policy=policy, seed=config.data_seed,
            max_new_tokens=self.answer_tokens, batch_size=config.generation_batch_size, forced=forced,
            path=completions, progress=self.progress,
        )  # fmt: skip
        result.settings.update(self.config.extraction.label)
        result.save(path)
        return result


def named_abroad(name: str) -> str:
    """A model's or a task's name for readers on other machines: of what lies here the last part of its path alone."""
    return Path(name).name if Path(name).expanduser().exists() else name


def examples_digest(examples: Iterable[Example]) -> str:
    """sha256 of worked examples with their spans, in order: the texts that decide a subspace, and what is scored."""
    digest = hashlib.sha256()
    for example in examples:
        parts = [example.prompt, example.completion, example.spans, example.prompt_spans]
        digest.update((json.dumps(parts) + "\n").encode())
    return digest.hexdigest()
