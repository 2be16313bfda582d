"""`Experiment`: settings, model, tasks and a folder; what is made of them is made once, checked, and kept."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from spd_lens.errors import SPDError
from spd_lens.evaluation import EvalResult, ForcedItem, evaluate, teacher_forced, with_answer_only
from spd_lens.examples import Example
from spd_lens.files import is_made
from spd_lens.generation import Corpus, generate
from spd_lens.models import Loss, ModelPair, load, weights_digest
from spd_lens.protocols import protocol
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.context_limit import fitted
from spd_lens.runs.run_dir import Folder, Run
from spd_lens.sandbox import passes_tests
from spd_lens.subspaces import GradientMoments, Policy, Subspace, check_texts, extract, shuffled_answers
from spd_lens.tasks import CodeTask, Task
from spd_lens.training import finetune

log = logging.getLogger(__name__)

Tasks = tuple[Task, dict[str, Task]]
"""The source task, and the tasks to evaluate on by the names that their results are kept under."""

Layers = Literal["all"] | None
"""Layers of an extraction: all, or None for the config's."""

_OF_THE_PAIR = (
    "model", "backend", "dtype", "device", "prompt_format", "add_special_tokens", "span_rule", "system",
    "enable_thinking", "prompt_date",
)  # fmt: skip
"""The settings that decide which pair is loaded."""


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
        """
        self.config, self.path, self.progress = config, Path(path), progress
        self.shared, self.answer_tokens = shared, answer_tokens
        self.begun: Run | None = None
        """The run whose model and data these must be; None where that is checked elsewhere."""
        self._loaded: dict[Path, GradientMoments] = {}
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
        key = repr([getattr(self.config, name) for name in _OF_THE_PAIR])
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
    def calibration(self) -> list[Example]:
        """The worked examples. They depend on `data_seed` and not on `seed`: all seeds see the same."""
        return self.task.calibration(self.config.n_calibration, self.config.data_seed)

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
    ) -> GradientMoments:
        """Gradient moments of the calibration examples, or of others (Eq. 6-8), anew: see `moments`."""
        examples = self.calibration if examples is None else examples
        log.info("extracting gradients of %d calibration examples", len(examples))
        changes = {key: value for key, value in (("loss", loss), ("layers", layers)) if value is not None}
        settings = self.config.extraction.model_copy(update=changes)
        return extract(self.pair, examples, settings=settings, progress=self.progress)

    def moments(
        self,
        *,
        loss: Loss | None = None,
        layers: Layers = None,
        shuffled: bool = False,
        seed: int | None = None,
    ) -> GradientMoments:
        """Gradient moments of the calibration examples, extracted on first use and kept in the folder.

        Args:
            loss: `"aligned"` or `"full"`; None: the config's.
            layers: `"all"`, or None for the config's.
            shuffled: With the answers permuted between the examples.
            seed: Seed of the permutation; None: the config's.

        Raises:
            SPDError: the folder holds an extraction of another model, of other sites, of another number of examples or
                of texts that were written, scored or cut in another way.
        """
        seed = self.config.seed if seed is None else seed
        path = self._place(loss or self.config.loss, layers, seed if shuffled else None)

        def examples() -> list[Example]:
            if not shuffled:
                return self.calibration
            # with a longer answer than its own, an example may no longer fit
            return self.task.kept("calibration", shuffled_answers(self.calibration, seed))

        found = self._loaded.get(path)
        if found is None:
            if not is_made(path, GradientMoments.load):
                self.extract(examples(), loss=loss, layers=layers).save(path)
            found = GradientMoments.load(path)
            if not shuffled:  # there is one of these for each seed, which is used once
                self._loaded[path] = found
        if self.begun is None:  # a run's own were checked when it was made, and need neither model nor data to be read
            self._check(found, path, layers, len(examples()))
        return found

    def _check(self, moments: GradientMoments, path: Path, layers: Layers, n_wanted: int) -> None:
        moments.fingerprint.check(self.pair.fingerprint, str(path))
        wanted = sorted(self.pair.sites(layers or self.config.layers, self.config.kinds))
        n_examples = int(moments.n_examples.sum())
        if moments.sites != wanted or n_examples != n_wanted:
            raise SPDError(
                f"{path} holds an extraction of {n_examples} examples at {', '.join(map(str, moments.sites))}, not of "
                f"{n_wanted} at {', '.join(map(str, wanted))}; give the experiment another folder"
            )
        check_texts(moments, self.pair, self.config.extraction, str(path))

    def _place(self, loss: Loss, layers: Layers, shuffle: int | None) -> Path:
        extra = (f"-{layers}-layers" if layers else "") + ("" if shuffle is None else f"-shuffled-{shuffle}")
        if self.shared:
            return self.path / f"moments-{loss}{extra}.safetensors"
        if loss != self.config.loss:
            extra = f"-{loss}{extra}"
        return (self.path / "analysis" if extra else self.path) / f"moments{extra}.safetensors"

    def subspace(self, moments: GradientMoments | None = None, *, of: str = "gradient") -> Subspace:
        """The config's rank or energy, blocks and centring, from the plain moments or from others (Eq. 9-11)."""
        config = self.config
        return (moments or self.moments()).subspace(
            config.rank, energy=config.energy, per_head=config.per_head, center_gradients=config.center_gradients,
            center=config.center, of=of,
        )  # fmt: skip

    def generate(
        self,
        path: Path | None,
        policy: Policy | None = None,
        prompts: Iterable[Example] | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        engine: str = "twin",
    ) -> Corpus:
        """Completions of the training prompts, or of others, under a policy (Eq. 12-13); an interrupted file goes on.

        Args:
            path: The JSONL file; None: the completions are not kept.
            policy: What to generate under; None: the model as it is.
            prompts: None: all training prompts.
            sampling: `temperature`, `top_p` and `top_k`, where they are not the config's.
            engine: `"twin"` (folded weights) or `"lens"` (hooks).
        """
        settings = self.config.sampling
        if sampling is not None:
            settings = settings.model_copy(update={key: sampling.get(key) for key in ("temperature", "top_p", "top_k")})
        return generate(
            self.pair, self.prompts if prompts is None else prompts, policy=policy, settings=settings, engine=engine,
            path=path, progress=self.progress,
        )  # fmt: skip

    def finetune(self, corpus: Corpus, out: Path, *, training: Mapping[str, Any] | None = None) -> Path:
        """An adapter, or a whole checkpoint, trained on a corpus (Eq. 14).

        Args:
            corpus: The completions.
            out: Where the adapter belongs.
            training: Fields of `TrainingSettings`, where they are not the config's.
        """
        settings = self.config.training.model_copy(update=training)
        return finetune(self.pair, corpus, settings=settings, out=out, progress=self.progress)

    def measure(
        self, items: Sequence[Example], policies: Sequence[Policy], target: str | None = None
    ) -> dict[str, list[ForcedItem]]:
        """Teacher-forced outcomes of policies on held-out items, by the policy's name.

        Args:
            items: Held-out items.
            policies: The policies.
            target: The target whose items they are; its answers are then also asked for without reasoning.
        """
        found = teacher_forced(self.pair, items, policies, progress=self.progress)
        if target is None:
            return found
        return with_answer_only(self.pair, self.targets[target], items, policies, found, progress=self.progress)

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


def load_pair(config: SPDConfig) -> ModelPair:
    """The pair that a config names."""
    log.info("loading %s", config.model)
    return load(config.model, **{name: getattr(config, name) for name in _OF_THE_PAIR[1:]})


def ready_pair(pair: ModelPair | None, config: SPDConfig, folder: Folder) -> ModelPair:
    """The pair that is given, or the one that the settings name, as on the day on which the folder was begun."""
    if pair is None:
        pair = load_pair(config)
    elif pair.has_lens:
        pair.check()  # an edited lens model would be measured, and the twin trained
    return folder.dated(pair)


def decided_by(pair: ModelPair, prompt_format: str) -> dict[str, Any]:
    """The settings that a pair which is loaded already has decided, whatever a config says; `prompt_format` is what it
    says of that."""
    form = pair.format
    day = form.prompt_date if form.date_given else None
    decided = {"model": pair.name, "system": form.system, "enable_thinking": form.enable_thinking, "prompt_date": day}
    if "verbatim" in (form.name, prompt_format):  # which no tokenizer stands for, as it does for the other two
        decided["prompt_format"] = form.name
    return {**decided, "add_special_tokens": form.add_special_tokens, "span_rule": form.span_rule}


def make_tasks(config: SPDConfig, *, trains: bool = True) -> Tasks:
    """The tasks that a config names, as its protocol has them; a task that is source and target is made once.

    Args:
        config: The settings.
        trains: Whether calibration examples or training prompts will be drawn: a protocol may ask for others than those
            that the data hold beside the test items.
    """
    chosen, form = protocol(config.protocol), config.prompt_format
    source = chosen.task_for(config.task, config.data_dir, config.task_options, form, source=trains)
    targets = {
        key: source if name == config.task else chosen.task_for(name, config.data_dir, {}, form, source=False)
        for key, name in config.targets.items()
    }
    allow_execution(config, [source, *targets.values()])
    return source, targets


def allow_execution(config: SPDConfig, tasks: Iterable[Task]) -> None:
    """Let tasks that score programs run them, where the settings say so."""
    for task in tasks if config.allow_code_execution else ():
        if isinstance(task, CodeTask):
            task.executor = passes_tests
