"""`Protocol`: settings, options of tasks and sizes that belong together, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from spd_lens.errors import SPDError
from spd_lens.settings import Extraction, SamplingSettings, TrainingSettings
from spd_lens.tasks import CodeTask, Task, configured

Name = Literal["paper", "reference", "apple-ssd"]
"""The protocols that there are; `SPDConfig.protocol` is one of them."""
NAMES: tuple[str, ...] = get_args(Name)

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_OF_A_SUBSPACE = ("rank", "energy", "per_head", "center", "center_gradients")
_OF_A_PAIR = ("prompt_format", "add_special_tokens", "span_rule")


class Source(NamedTuple):
    """Where a protocol's value of one point comes from."""

    value: str
    """What a reader should know beside the value itself; it may be empty."""
    where: str
    """A table, equation or section, a model card, the reference code, or this project's default."""


@dataclass(frozen=True)
class Protocol:
    """Settings, options of tasks and sizes that belong together. Whatever a user gives goes over them."""

    name: str
    says: str
    """What it is, in one line."""
    sources: Mapping[str, Source]
    """Where each point of the table in docs/protocols.md comes from, by the point's name."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `SPDConfig` over its defaults."""
    task_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options by task, wherever the task is used."""
    source_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options by task, where it is the source of calibration examples and training prompts."""
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """`n_calibration`, `n_train` and `n_eval` by task, where the protocol has them."""
    methods: tuple[str, ...] = ()
    """Methods of a study that names none; none here: the study's own default."""

    @property
    def extraction(self) -> Extraction:
        """What `extract(settings=...)` takes."""
        return Extraction(**self._of(Extraction.model_fields)).labelled(self.name)

    @property
    def subspace_options(self) -> dict[str, Any]:
        """What `GradientMoments.subspace(**...)` takes."""
        return self._of(_OF_A_SUBSPACE)

    @property
    def sampling(self) -> SamplingSettings:
        """What `generate(settings=...)` takes."""
        return SamplingSettings(**self._of(SamplingSettings.model_fields)).labelled(self.name)

    @property
    def training(self) -> TrainingSettings:
        """What `finetune(settings=...)` takes."""
        return TrainingSettings(**self._of(TrainingSettings.model_fields)).labelled(self.name)

    @property
    def load_options(self) -> dict[str, Any]:
        """What `load(name, **...)` takes."""
        return self._of(_OF_A_PAIR)

    def options(self, task: str, *, source: bool = True) -> dict[str, Any]:
        """The options of a task under this protocol; none for a task that the protocol does not know.

        Args:
            task: The task's name.
            source: Whether calibration examples and training prompts come from it.
        """
        own = self.source_options.get(task, _NOTHING) if source else _NOTHING
        return {**self.task_options.get(task, _NOTHING), **own}

    def task(self, name: str, path: str | Path | None = None, /, **options: Any) -> Task:
        """The task as this protocol has it, with some options over its own; see `tasks.get`."""
        executor = options.pop("executor", None)
        made = self.task_for(name, path, options, self.settings.get("prompt_format", "auto"))
        if executor is None:
            return made
        if not isinstance(made, CodeTask):
            raise SPDError(f"{name} runs no programs, so that it takes no executor; leave it out")
        return replace(made, executor=executor)

    def task_for(
        self,
        name: str,
        path: str | Path | None,
        options: Mapping[str, Any],
        prompt_format: str = "auto",
        *,
        source: bool = True,
    ) -> Task:
        """The task as this protocol has it, for settings that name it.

        Args:
            name: The task's name.
            path: The directory with its data; None: the hub.
            options: What the user says of it, which goes over the protocol.
            prompt_format: The setting; with `"verbatim"`, own data is taken as it is written.
            source: Whether calibration examples and training prompts come from it.

        Raises:
            SPDError: There is no such task, or these data cannot be what the protocol asks for.
        """
        own = self.options(name, source=source)
        try:
            return configured(name, path, {**own, **options}, prompt_format)
        except SPDError as error:
            if not (sets := [f"{key} = {value!r}" for key, value in own.items() if key not in options]):
                raise
            raise SPDError(
                f"{error} (protocol {self.name!r} sets {', '.join(sets)}; an option of the task goes over it)"
            ) from error

    def sizes_for(self, source: str, targets: Iterable[str], default: int) -> dict[str, Any]:
        """`n_calibration` and `n_train` of a source and `n_eval` by target, as far as the protocol knows the tasks.

        Args:
            source: The source task.
            targets: The tasks to evaluate on.
            default: Test items of a task that the protocol does not know.
        """
        found: dict[str, Any] = {k: v for k, v in self.sizes.get(source, _NOTHING).items() if k != "n_eval"}
        known = {target: self.sizes.get(target, _NOTHING).get("n_eval") for target in targets}
        if any(n is not None for n in known.values()):
            # results of a file of one's own are kept under its stem
            names = {task: Path(task).stem if task.endswith(".jsonl") else task for task in known}
            found["n_eval"] = {names[task]: default if n is None else n for task, n in known.items()}
        return found

    def _of(self, names: Collection[str]) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if name in names}
