"""`SPDConfig`: everything that decides what a run does, with the paper's values as defaults (tables 7-8)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from spd_lens.errors import SPDError, integer_or_fraction, shortened
from spd_lens.files import check_recorded, refuse_stand_in
from spd_lens.protocols import Name, departures, with_protocol
from spd_lens.registry import did_you_mean
from spd_lens.runs.plain_yaml import parse_yaml, read_text
from spd_lens.settings import (
    COMMAS,
    DEFAULT_MODEL,
    CompletionGroup,
    EngineSettings,
    Extraction,
    GradientGroup,
    OptimisationGroup,
    SamplingSettings,
    SeedGroup,
    Settings,
    SiteGroup,
    TrainingSettings,
)
from spd_lens.tasks import PRESETS

if TYPE_CHECKING:
    from spd_lens.estimators import Shape

_Model = TypeVar("_Model", bound=BaseModel)
_N_EVAL = 100
BESIDE = ("published_name", "report_to", "strict")
"""Settings that change no result: whose published numbers a report shows beside it, where losses are watched, and
whether guardrails stop the run."""


class ProtocolGroup(Settings):
    """What every setting is that nobody gives."""

    protocol: Name = Field("paper", description="Settings that belong together: paper, reference or apple-ssd.")


class ModelGroup(Settings):
    """The model, and how prompts are written for it."""

    panel = "Model and prompts"

    model: str = Field(DEFAULT_MODEL, description="Hub name, model directory or .gguf file.")
    backend: Literal["auto", "hooked", "bridge"] = Field("auto", description="TransformerLens backend.")
    dtype: str = Field("auto", description="float32, bfloat16, float16, or auto (bfloat16 where the hardware has it).")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="Over several devices: auto, balanced, sequential, or PART=DEVICE,...; else all on one."
    )
    offload_folder: str | None = Field(
        None, description="Folder for weights on disk that the checkpoint holds in another form."
    )
    prompt_format: Literal["auto", "chat", "raw", "verbatim"] = Field(
        "auto", description="Chat template, raw text and a line break (raw), or the text as it is (verbatim)."
    )
    add_special_tokens: bool = Field(
        True, description="Begin raw and verbatim prompts with what the tokenizer adds to any text (such as BOS)."
    )
    span_rule: Literal["overlap", "inside"] = Field(
        "overlap", description="Score tokens that overlap a span, or only those that lie inside one."
    )
    system: str | None = Field(None, description="System message of chat prompts; else the template's own.")
    enable_thinking: bool | None = Field(
        None, description="Room for thoughts in a thinking model's prompts; else the template's own default."
    )
    prompt_date: str | None = Field(
        None, description="Day (YYYY-MM-DD) that a template which shows today's date is told; else the run's first day."
    )
    published_name: str | None = Field(
        None, description="The name under which results of a local model were published; else what its files say."
    )

    @field_validator("device_map", mode="before")
    @classmethod
    def _places(cls, value: Any) -> Any:
        """`"model.embed_tokens=0,model.layers=disk"` is a device for each part; a number is a GPU."""
        if isinstance(value, str) and "=" in value:
            value = {part.partition("=")[0].strip(): part.partition("=")[2].strip() for part in value.split(",")}
        if not isinstance(value, dict):
            return value
        return {name: int(to) if isinstance(to, str) and to.isdecimal() else to for name, to in value.items()}

    @field_validator("prompt_date", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        """YAML reads an unquoted day as a date."""
        try:
            return str(date.fromisoformat(str(value))) if value is not None else None
        except ValueError as error:
            raise ValueError("write a day as YYYY-MM-DD") from error


class DataGroup(Settings):
    """The examples."""

    panel = "Tasks and sizes"

    task: str = Field("gsm8k", description="Source task: calibration, training prompts and evaluation.")
    data_dir: str | None = Field(None, description="Directory with the original data files; else the hub.")
    task_options: dict[str, Any] = Field(default_factory=dict, description="Options of the source task.")
    eval_tasks: Annotated[list[str], COMMAS] = Field(
        default_factory=list, description="Tasks to evaluate on; the source task if empty."
    )
    n_calibration: int = Field(50, ge=1, description="Calibration examples.")
    span: str | None = Field(
        None, description="Spans of the calibration examples, such as results or answer-only; else the task's own."
    )
    n_train: int = Field(500, ge=1, description="Training prompts, one completion each.")
    n_eval: int | dict[str, int] = Field(_N_EVAL, description="Test items per task; or for each: gsm8k=100,mbpp=257.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="Texts beyond the context: refuse them, or leave them out and count them."
    )
    allow_code_execution: bool = Field(False, description="Run generated programs, in the sandbox, to score them.")

    @field_validator("n_eval", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        if isinstance(value, str) and "=" in value:
            value = {part.partition("=")[0]: part.partition("=")[2] for part in value.split(",")}
        counts = dict(value) if isinstance(value, dict) else {"": value}
        for name, count in counts.items():
            counts[name] = int(count) if isinstance(count, str) and count.strip().isdecimal() else count
            if type(counts[name]) is not int or counts[name] < 1:
                raise ValueError("write a number of items of at least 1, or one for each task as in gsm8k=100,mbpp=257")
        return {str(name).strip(): count for name, count in counts.items()} if isinstance(value, dict) else counts[""]


class SubspaceGroup(Settings):
    """Which subspace is taken from the gradients, and how it is applied."""

    panel = "Subspace"

    estimator: str = Field("paper", description="How the subspace is taken from the gradients: docs/estimators.md.")
    rank: int | float = Field(0.5, description="Directions per block: an integer, or a fraction of its width.")
    per_head: bool = Field(True, description="One projector per KV head, or one joint projector.")
    energy: float | None = Field(
        None, gt=0, le=1, description="Share of the squared singular values to keep per block, in place of rank."
    )
    center_gradients: bool = Field(False, description="Take the mean of all gradient rows off before the SVD.")
    center: bool = Field(False, description="Project around the mean activation instead of the origin.")
    strength: float = Field(1.0, ge=0, le=1, description="Strength of the projection, 0 to 1.")

    @field_validator("estimator")
    @classmethod
    def _known_estimator(cls, name: str) -> str:
        if name != "paper":
            from spd_lens import estimators  # they import torch, which settings and --help do not need

            estimators.get(name)
        return name

    @field_validator("rank", mode="before")
    @classmethod
    def _possible_rank(cls, value: Any) -> Any:
        """An integer counts directions, a fraction is a share of the width: `1` is one direction, `1.0` all of them."""
        rank = integer_or_fraction(value) if isinstance(value, str) else value
        if isinstance(rank, bool) or not isinstance(rank, int | float):
            raise ValueError("write an integer, or a fraction of the block's width")
        if rank < 1 if isinstance(rank, int) else not 0 < rank <= 1:
            raise ValueError("write a number of directions of at least 1, or a fraction of the width up to 1.0")
        return rank


class ReportGroup(Settings):
    """Where a training is watched."""

    panel = "Training"

    report_to: str = Field(
        "none", description="Trackers that also get the training losses: none, tensorboard, trackio, wandb."
    )


class GuardrailGroup(Settings):
    """What happens where a result should not be trusted."""

    panel = "Evaluation and seeds"

    strict: bool = Field(False, description="Stop where a guardrail warns that a result should not be trusted.")


class EvaluationGroup(Settings):
    """What is measured, and the seed of the draws of examples."""

    panel = "Evaluation and seeds"

    policies: Annotated[list[Literal["base", "projected", "spd"]], COMMAS] = Field(
        ["base", "spd"], min_length=1, description="Policies to score by generation: base, projected, spd."
    )
    n_random: int = Field(5, ge=0, description="Random subspaces of the same ranks, as controls.")
    n_compared: int = Field(32, ge=1, description="Prompts also answered without projection, to see what changed.")
    data_seed: int = Field(
        42, ge=0, lt=2**32, description="Seed of the draws of examples; the same for runs to compare."
    )


# Settings are written in the order of the groups from the last to the first, since bases come before their classes.
class SPDConfig(
    GuardrailGroup, SeedGroup, EvaluationGroup, ReportGroup, OptimisationGroup, EngineSettings, CompletionGroup,
    GradientGroup, SubspaceGroup,
    SiteGroup, DataGroup, ModelGroup, ProtocolGroup,
):  # fmt: skip
    """Settings of a run. Unknown keys are refused; every field has a default and a reason in docs/configuration.md.

    A protocol (`spd_lens.protocols`) fills in what is not given.
    """

    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)

    lora_alpha: int = Field(8, ge=1, description="LoRA alpha.")  # in files and flags a whole number

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        return with_protocol(given, _N_EVAL) if isinstance(given, dict) else given

    @field_validator("across_heads")
    @classmethod
    def _joint_needs_products_across_heads(cls, value: bool, info: ValidationInfo) -> bool:
        if not (value or info.data.get("per_head", True)):
            raise ValueError("joint subspaces (--joint) need products across heads; choose --per-head, or leave it on")
        return value

    @field_validator("model", "data_dir", "offload_folder", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _engine_reads_its_settings(self) -> Self:
        """There is such an engine, and it reads what is given of its settings."""
        if self.generation_engine != "twin" or self.given:
            from spd_lens.generation import engines  # they import torch, which settings and --help do not need

            engines.find(self.generation_engine).check(self)
        return self

    @property
    def departures(self) -> dict[str, tuple[Any, Any]]:
        """What decides a point of the protocol and is not as it has it: its value and this config's, by name."""
        return departures(self, _N_EVAL)

    @property
    def extraction(self) -> Extraction:
        """The settings of `extract`."""
        return Extraction.of(self)

    @property
    def shape(self) -> Shape:
        """What an estimator is asked for: rank or energy, blocks and centring."""
        from spd_lens.estimators import Shape

        return Shape(**{name: getattr(self, name) for name in Shape.__dataclass_fields__})

    @property
    def sampling(self) -> SamplingSettings:
        """The settings of `generate`."""
        return SamplingSettings.of(self)

    @property
    def engine_settings(self) -> EngineSettings:
        """The engine that generates corpora, and its settings."""
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.model_fields})

    @property
    def training(self) -> TrainingSettings:
        """The settings of `finetune`."""
        return TrainingSettings.of(self)

    def n_test(self, task: str) -> int:
        """Test items of one of the tasks to evaluate on."""
        return items_of("n_eval", self.n_eval, task)

    @classmethod
    def make(cls, settings: dict[str, Any]) -> SPDConfig:
        """Validate settings; `SPDError` in one sentence that names the first wrong one."""
        return validated(cls, settings)

    @classmethod
    def read(
        cls, path: str | Path | None, overrides: dict[str, Any] | None = None, preset: str | None = None
    ) -> SPDConfig:
        """A YAML file with some settings over it; then the preset's sizes, then the protocol, then the defaults.

        Of `task_options`, file and overrides are joined.
        """
        settings = {} if path is None else read_yaml(path)
        over = dict(overrides or {})
        one_protocol(settings, over, f"config file {path}")
        if isinstance(options := settings.get("task_options"), dict) and "task_options" in over:
            over["task_options"] = {**options, **over["task_options"]}
        merged = {**settings, **over}
        if preset is None:
            return cls.make(merged)
        return cls.make({**preset_sizes(preset, cls.make(merged)), **merged})

    def to_yaml(self, *, ascii: bool = False) -> str:
        """All settings, as `read` takes them; `ascii` spells other characters out."""
        return to_yaml(self, ascii=ascii)

    def differences(self, other: SPDConfig) -> dict[str, tuple[Any, Any]]:
        """Settings in which two configs differ, with both values."""
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return {key: (mine[key], theirs[key]) for key in mine if differ(key, mine[key], theirs[key])}

    @property
    def targets(self) -> dict[str, str]:
        """The tasks to evaluate on, by the name that their results are kept under: a file of one's own by its stem."""
        return named(self.eval_tasks or [self.task])


def one_protocol(under: Mapping[str, Any], over: Mapping[str, Any], where: str) -> None:
    """Refuse another protocol over one that a file names: the file's settings would be taken for the other's."""
    names = [settings.get("protocol") for settings in (under, over)]
    if None not in names and names[0] != names[1]:
        raise SPDError(
            f"{where} is of protocol {names[0]!r}, not {names[1]!r}, and what it says would go over what that protocol "
            "sets; take the line 'protocol' out of it, and every line that the protocol should decide"
        )


def protocol_in_words(config: SPDConfig) -> str:
    """The protocol, and the settings that were given over it; nothing for the default protocol."""
    if config.protocol == "paper":
        return ""
    other = [f"{name} {_said(now)} (there {_said(there)})" for name, (there, now) in config.departures.items()]
    return f"{config.protocol} (docs/protocols.md){', but for ' + ', '.join(other) if other else ''}"


def _said(value: Any) -> Any:
    """A value as a flag takes it."""
    if isinstance(value, dict):
        return ",".join(f"{name}={count}" for name, count in value.items())
    return "not set" if value is None else ",".join(map(str, value)) if isinstance(value, list) else value


def items_of(setting: str, counts: int | dict[str, int], task: str) -> int:
    """The number of items of a task in a setting that has one number for all tasks, or one for each."""
    if isinstance(counts, int):
        return counts
    if task not in counts:
        raise SPDError(f"{setting} names no number of items for {task}; it has {', '.join(counts)}")
    return counts[task]


def named(tasks: Iterable[str]) -> dict[str, str]:
    """Tasks by the name that their results are kept under."""
    listed = list(tasks)
    found = {result_name(name): name for name in listed}
    if len(found) < len(set(listed)):
        raise SPDError(f"two of the tasks {', '.join(listed)} have the same name; rename one of the files")
    return found


def differ(key: str, one: Any, other: Any) -> bool:
    """Whether two values of a setting are not the same.

    `1 == 1.0` in Python, but rank 1 is one direction and 1.0 is all. A model's directory has more than one spelling.
    What is in `BESIDE` changes no result, nor does where a server is: what it serves is compared with the twin, and the
    corpus records it.
    """
    if key in BESIDE or key.startswith("engine_"):
        return False
    if key == "model" and isinstance(one, str) and isinstance(other, str):
        one, other = (str(Path(model).resolve()) if Path(model).exists() else model for model in (one, other))
    return json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True)


def result_name(task: str) -> str:
    """The name that a task's results are kept under: of a file of one's own its stem."""
    if not task.endswith(".jsonl"):
        return task
    stem = Path(task).stem
    if not stem.strip("."):
        raise SPDError(f"the results of {task} cannot be kept under the name {stem!r}; rename the file")
    return stem


def validated(model: type[_Model], settings: dict[str, Any]) -> _Model:
    """A pydantic model of these settings; `SPDError` in one sentence that names the first wrong one."""
    try:
        return model(**settings)
    except ValidationError as error:
        problem = error.errors()[0]
        place = shortened(".".join(map(str, problem["loc"])), 200)
        if problem["type"] == "extra_forbidden":
            known = list(model.model_fields)
            listed = did_you_mean(place, known) or f"; the settings are {', '.join(known)}"
            raise SPDError(f"unknown setting {place!r}{listed}") from error
        reason = problem["msg"].removeprefix("Value error, ")
        given = shortened(repr(problem["input"]), 200)
        raise SPDError(f"setting {place} = {given} is not possible: {shortened(reason, 400)}") from error


def to_yaml(settings: BaseModel, *, ascii: bool = False) -> str:
    """A whole YAML document: `---` begins it and `...` ends it, by which `read_kept` knows that nothing was lost."""
    return yaml.safe_dump(
        settings.model_dump(mode="json"),
        sort_keys=False, allow_unicode=not ascii, explicit_start=True, explicit_end=True,
    )  # fmt: skip


def read_kept(path: Path) -> dict[str, Any]:
    """The settings file that a run or a study keeps; `SPDError` if it is empty or was cut off."""
    text = read_text(path)
    # earlier versions wrote no marks
    if not text.strip("\0 \n") or (text.startswith("---") and not text.rstrip().endswith("\n...")):
        raise SPDError(f"{path} is empty or cut off; write the settings into it again, or start a new directory")
    refuse_stand_in(path)
    check_recorded(path)
    return read_yaml(path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The 'setting: value' lines of a file; `SPDError` in one sentence if it cannot be read or holds something else."""
    refuse_stand_in(path)
    try:
        content = parse_yaml(read_text(path))
    except ValueError as error:
        raise SPDError(f"config file {path} cannot be read: {error}") from error
    settings = {} if content is None else content  # an empty file leaves all defaults
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise SPDError(f"config file {path} must hold 'setting: value' lines")
    return settings


def preset_sizes(name: str, config: SPDConfig) -> dict[str, Any]:
    """The sizes that a preset of `tasks.PRESETS` has for a config's source task and tasks to evaluate on."""
    if name not in PRESETS:
        raise SPDError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    known = PRESETS[name]
    for task in (config.task, *config.targets):
        if task not in known:
            raise SPDError(f"preset {name!r} has no sizes for {task}; it has {', '.join(known)}")
    source = known[config.task]
    if not source["n_train"]:
        raise SPDError(f"preset {name!r} only evaluates on {config.task}; choose another source task")
    n_eval = {task: known[task]["n_test"] for task in config.targets}
    return {"n_calibration": source["n_calibration"], "n_train": source["n_train"], "n_eval": n_eval}


DEMO: dict[str, Any] = {
    "task": "synthetic-math",
    "task_options": {"difficulty": "easy"},
    # a few dozen short texts make 4 to 24 optimiser steps: at the paper's 1e-5 nothing would move that one could see
    "lr": 2e-4,
}
"""Settings of `spd-lens demo` at every size: the whole job in a few minutes on two cores."""
Size = Literal["small", "medium", "large"]
_COUNTED = ("n_calibration", "n_train", "epochs", "max_new_tokens", "n_eval", "n_random", "n_compared")
_COUNTS: dict[Size, tuple[int, ...]] = {
    "small": (20, 16, 2, 64, 20, 2, 8),
    "medium": (32, 40, 2, 64, 40, 3, 16),
    "large": (50, 64, 3, 96, 96, 5, 32),
}
DEMO_SIZES = {size: {**DEMO, **dict(zip(_COUNTED, counts, strict=True))} for size, counts in _COUNTS.items()}
"""Settings of `spd-lens demo` by size, in ascending order."""
