"""`SPDConfig`: everything that decides what a run does, with the paper's values as defaults (tables 7-8)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from spd_lens.defaults import DEFAULT_MODEL
from spd_lens.errors import SPDError
from spd_lens.numbers import plain
from spd_lens.sites import KINDS
from spd_lens.stand_ins import refuse_stand_in
from spd_lens.tasks import PRESETS

_Model = TypeVar("_Model", bound=BaseModel)


class Settings(BaseModel):
    """Settings whose numbers may be numpy's or torch's, and in which true and false are no numbers."""

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, given: Any) -> Any:
        return plain(dict(given)) if isinstance(given, dict) else given

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        kinds = get_args(kind := cls.model_fields[str(info.field_name)].annotation) or (kind,)
        numbers = int in kinds or float in kinds
        if numbers and bool not in kinds and any(type(part) is bool for part in (value, *_parts(value))):
            raise ValueError("true and false are no numbers")
        return value


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else list(value.values()) if isinstance(value, dict) else ()


class SPDConfig(Settings):
    """Settings of a run. Unknown keys are refused; every field has a default and a reason in docs/configuration.md."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    # model
    model: str = Field(DEFAULT_MODEL, description="Hub name, model directory or .gguf file.")
    backend: Literal["auto", "hooked", "bridge"] = Field("auto", description="TransformerLens backend.")
    dtype: str = Field("auto", description="float32, bfloat16, float16, or auto (bfloat16 where the hardware has it).")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    prompt_format: Literal["auto", "chat", "raw"] = Field("auto", description="Chat template or raw text.")
    system: str | None = Field(None, description="System message of chat prompts; else the template's own.")
    enable_thinking: bool | None = Field(
        None, description="Room for thoughts in a thinking model's prompts; else the template's own default."
    )
    prompt_date: str | None = Field(
        None, description="Day (YYYY-MM-DD) that a template which shows today's date is told; else the run's first day."
    )
    # data
    task: str = Field("gsm8k", description="Source task: calibration, training prompts and evaluation.")
    data_dir: str | None = Field(None, description="Directory with the original data files; else the hub.")
    task_options: dict[str, Any] = Field(default_factory=dict, description="Options of the source task.")
    eval_tasks: list[str] = Field(default_factory=list, description="Tasks to evaluate on; the source task if empty.")
    n_calibration: int = Field(50, ge=1, description="Calibration examples.")
    n_train: int = Field(500, ge=1, description="Training prompts, one completion each.")
    n_eval: int | dict[str, int] = Field(100, description="Test items per task; or for each: gsm8k=100,mbpp=257.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="Texts beyond the context: refuse them, or leave them out and count them."
    )
    allow_code_execution: bool = Field(False, description="Run generated programs, in the sandbox, to score them.")
    # subspace
    layers: str | list[int] = Field("last_mid", description="last_mid, all, or block indices such as 14,29.")
    kinds: list[str] = Field(["k", "v"], min_length=1, description="Activations to project: k, v, q, z, resid.")
    rank: int | float = Field(0.5, description="Directions per block: an integer, or a fraction of its width.")
    per_head: bool = Field(True, description="One projector per KV head, or one joint projector.")
    center: bool = Field(False, description="Project around the mean activation instead of the origin.")
    strength: float = Field(1.0, ge=0, le=1, description="Strength of the projection, 0 to 1.")
    loss: Literal["aligned", "full"] = Field("aligned", description="Score correctness tokens or whole completions.")
    engine: Literal["lens", "twin"] = Field("lens", description="Where gradients are captured.")
    # generation
    max_new_tokens: int = Field(256, ge=1, description="Token limit of a self-generated completion.")
    temperature: float | None = Field(None, ge=0, description="Sampling temperature; else the model's own, else 0.7.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus mass; else the model's own, else 0.95.")
    top_k: int | None = Field(None, ge=0, description="Tokens kept; else the model's own, else all (0).")
    generation_batch_size: int | None = Field(None, ge=1, description="Completions at once; else what memory holds.")
    # training
    method: Literal["lora", "full"] = Field("lora", description="LoRA adapter or full fine-tuning.")
    epochs: int = Field(5, ge=1, description="Passes over the corpus.")
    lr: float = Field(1e-5, gt=0, description="Peak learning rate, cosine schedule.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    train_batch_size: int = Field(8, ge=1, description="Sequences per optimiser step.")
    lora_rank: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(8, ge=1, description="LoRA alpha.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="LoRA dropout.")
    lora_targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1, description="Modules with LoRA."
    )
    loss_on: Literal["all", "completion"] = Field("all", description="Train on prompt and completion, or completion.")
    # evaluation
    policies: list[Literal["base", "projected", "spd"]] = Field(
        ["base", "spd"], min_length=1, description="Policies to score by generation: base, projected, spd."
    )
    n_random: int = Field(5, ge=0, description="Random subspaces of the same ranks, as controls.")
    n_compared: int = Field(32, ge=1, description="Prompts also answered without projection, to see what changed.")
    data_seed: int = Field(
        42, ge=0, lt=2**32, description="Seed of the draws of examples; the same for runs to compare."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of sampling, training and random subspaces.")

    @field_validator("kinds", "eval_tasks", "lora_targets", "policies", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("model", "data_dir", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("prompt_date", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        """YAML reads an unquoted day as a date."""
        try:
            return str(date.fromisoformat(str(value))) if value is not None else None
        except ValueError as error:
            raise ValueError("write a day as YYYY-MM-DD") from error

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: list[str]) -> list[str]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
        return kinds

    @field_validator("layers", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        """`14`, `"14,29"` and `[14, 29]` are block indices; a run resumed with another spelling is the same run."""
        if value in ("last_mid", "all"):
            return value
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if not parts or not all(
            type(part) is int or isinstance(part, str) and part.strip().isdigit() for part in parts
        ):
            raise ValueError("write last_mid, all or block indices such as 14,29")
        return sorted({int(part) for part in parts})

    @field_validator("rank", mode="before")
    @classmethod
    def _possible_rank(cls, value: Any) -> Any:
        """An integer counts directions, a fraction is a share of the width: `1` is one direction, `1.0` all of them."""
        rank = (
            (int(value) if value.strip().lstrip("+-").isdigit() else float(value)) if isinstance(value, str) else value
        )
        if isinstance(rank, bool) or not isinstance(rank, int | float):
            raise ValueError("write an integer, or a fraction of the block's width")
        if rank < 1 if isinstance(rank, int) else not 0 < rank <= 1:
            raise ValueError("write a number of directions of at least 1, or a fraction of the width up to 1.0")
        return rank

    @field_validator("n_eval", mode="before")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        if isinstance(value, str) and "=" in value:
            value = {part.partition("=")[0]: part.partition("=")[2] for part in value.split(",")}
        counts = dict(value) if isinstance(value, dict) else {"": value}
        for name, count in counts.items():
            counts[name] = int(count) if isinstance(count, str) and count.strip().isdigit() else count
            if type(counts[name]) is not int or counts[name] < 1:
                raise ValueError("write a number of items of at least 1, or one for each task as in gsm8k=100,mbpp=257")
        return {str(name).strip(): count for name, count in counts.items()} if isinstance(value, dict) else counts[""]

    def n_test(self, task: str) -> int:
        """Test items of one of the tasks to evaluate on."""
        if isinstance(self.n_eval, int):
            return self.n_eval
        if task not in self.n_eval:
            raise SPDError(f"n_eval names no number of items for {task}; it has {', '.join(self.n_eval)}")
        return self.n_eval[task]

    @classmethod
    def make(cls, settings: dict[str, Any]) -> SPDConfig:
        """Validate settings; `SPDError` in one sentence that names the first wrong one."""
        return validated(cls, settings)

    @classmethod
    def read(
        cls, path: str | Path | None, overrides: dict[str, Any] | None = None, preset: str | None = None
    ) -> SPDConfig:
        """A YAML file with some settings over it; then the preset's sizes, then the defaults where none speaks.

        Of `task_options`, file and overrides are joined.
        """
        settings = {} if path is None else read_yaml(path)
        over = dict(overrides or {})
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

        def text(value: Any) -> str:  # 1 == 1.0 in Python, but rank 1 is one direction and rank 1.0 is all
            return json.dumps(value, sort_keys=True)

        return {key: (mine[key], theirs[key]) for key in mine if text(mine[key]) != text(theirs[key])}

    @property
    def targets(self) -> dict[str, str]:
        """The tasks to evaluate on, by the name that their results are kept under: a file of one's own by its stem."""
        names = self.eval_tasks or [self.task]
        targets = {result_name(name): name for name in names}
        if len(targets) < len(set(names)):
            raise SPDError(f"two of the tasks {', '.join(names)} have the same name; rename one of the files")
        return targets


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
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            raise SPDError(f"unknown setting {place!r}; the settings are {', '.join(model.model_fields)}") from error
        reason = problem["msg"].removeprefix("Value error, ")
        raise SPDError(f"setting {place} = {problem['input']!r} is not possible: {reason}") from error


def to_yaml(settings: BaseModel, *, ascii: bool = False) -> str:
    """A whole YAML document: `---` begins it and `...` ends it, by which `check_whole` knows that nothing was lost."""
    return yaml.safe_dump(
        settings.model_dump(mode="json"),
        sort_keys=False, allow_unicode=not ascii, explicit_start=True, explicit_end=True,
    )  # fmt: skip


def check_whole(path: Path) -> None:
    """Raise `SPDError` if a settings file that a run or a study keeps is empty or was cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # `read_yaml` says what is wrong
    # earlier versions wrote no marks
    if not text.strip("\0 \n") or (text.startswith("---") and not text.rstrip().endswith("\n...")):
        raise SPDError(f"{path} is empty or cut off; write the settings into it again, or start a new directory")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The 'setting: value' lines of a file; `SPDError` in one sentence if it cannot be read or holds something else."""
    refuse_stand_in(path)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SPDError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
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
    "n_train": 64,
    "n_eval": 96,
    "max_new_tokens": 96,
    # 64 short texts make 24 optimiser steps: at the paper's 1e-5 nothing would move that one could see
    "epochs": 3,
    "lr": 2e-4,
}
"""Settings of `spd-lens demo`: the whole job in a few minutes on two cores."""
