"""`StudyConfig`: which methods, tasks and seeds a study has, and the settings that all of its cells share."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from spd_lens.errors import SPDError
from spd_lens.protocols import Protocol, protocol
from spd_lens.runs import Size, SPDConfig, differ, items_of, named, one_protocol, read_yaml, to_yaml, validated
from spd_lens.settings import Settings

if TYPE_CHECKING:
    from spd_lens.tasks import Task

TINY = "tiny"
TINY_SIZES: dict[Size, dict[str, Any]] = {
    "small": {
        "seeds": [1, 2],
        "n_forced": 16,
        "n_side_effects": 2,
        "settings": {"n_calibration": 16, "n_train": 16, "n_eval": 16},
    },
    "medium": {"n_forced": 32, "settings": {"n_calibration": 24, "n_train": 24, "n_eval": 32}},
    "large": {},
}
"""What the sizes of the preset `tiny` change in it, in ascending order."""
BASE = "base"
"""The method that is no training at all; a study always measures it, since everything is compared with it."""

_OURS = ("task", "task_options", "eval_tasks", "seed", "policies", "n_random", "n_compared", "estimator")
"""Settings of a run that a study decides itself, cell by cell, or has no use for."""
_ONE_FOR_ALL = (
    "protocol", "model", "prompt_format", "add_special_tokens", "span_rule", "system", "enable_thinking",
    "prompt_date", "published_name", "too_long", "n_eval", "data_seed", "data_dir",
)  # fmt: skip
"""Settings that cannot differ by source: all cells share one model, its prompts and the items."""
_GROWING = ("methods", "seeds")
"""What may be added to a study that exists; everything else would change the cells that are there."""


class StudyConfig(Settings):
    """Settings of a study. Unknown keys are refused; `make` and `read` give a sentence instead of a traceback."""

    methods: list[str] = Field(["base", "psr", "ssd", "spd", "spd-random"], min_length=1)
    """Names of `spd_lens.methods`; the base model is measured whether or not it is among them."""
    sources: list[str] = Field(["gsm8k"], min_length=1)
    """Tasks that give calibration examples and training prompts."""
    targets: list[str] = Field(default_factory=list)
    """Tasks to evaluate on; the sources if empty."""
    seeds: list[int] = Field([42], min_length=1)
    """Seeds of sampling, training and random subspaces. Prompts and items depend on `data_seed` and are the same."""
    n_forced: int | dict[str, int] | None = None
    """Number of test items measured teacher-forced, one for all targets or one for each; None: as many as `n_eval`."""
    n_side_effects: int = Field(16, ge=0)
    """Number of texts of each set on which side effects are measured; 0 for none."""
    score_projected: bool = False
    """Also score greedy completions under the projection, before any training (paper table 3)."""
    task_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of tasks, by the task's name as it stands in `sources` or `targets`."""
    source_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that differ by source, over `settings`: the paper trains on 7,473, 464 or 2,000 prompts."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of `SPDConfig` that all cells share. `n_eval` is the number of items whose completions are scored."""

    @field_validator("methods", "sources", "targets", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any], info: ValidationInfo) -> list[Any]:
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{twice[0]!r} stands there twice")
        if info.field_name == "seeds" and not all(0 <= seed < 2**32 for seed in values):
            raise ValueError("seeds are whole numbers from 0 to 4294967295")
        return values

    @field_validator("n_forced")
    @classmethod
    def _counts(cls, value: int | dict[str, int] | None) -> int | dict[str, int] | None:
        if value is not None and min(value.values() if isinstance(value, dict) else [value], default=0) < 1:
            raise ValueError("write a number of items of at least 1, or one for each target")
        return value

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Write out all shared settings, the targets where none are named, and what the protocol adds."""
        given = dict(given)
        if not given.get("targets") and isinstance(given.get("sources", []), list):
            given["targets"] = list(given.get("sources") or ["gsm8k"])
        if isinstance(settings := given.get("settings", {}), dict):
            _refuse(settings, "settings")
            tasks = {"task": "gsm8k", "eval_tasks": given.get("targets")}
            full = SPDConfig.make({**settings, **tasks}).model_dump(mode="json")
            given["settings"] = {key: value for key, value in full.items() if key not in _OURS}
            given |= _of_protocol(protocol(full["protocol"]), given, settings)
        return given

    @classmethod
    def make(cls, settings: Mapping[str, Any]) -> StudyConfig:
        """Validate settings; `SPDError` in one sentence that names the first wrong one. Reads no data and no model."""
        config = validated(cls, dict(settings))
        config._check_names()
        for source in config.sources:  # what differs by source is validated with what is shared
            config.cell(source, config.seeds[0])
        return config

    @classmethod
    def read(
        cls,
        path: str | Path | None = None,
        *,
        preset: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        size: Size | None = None,
    ) -> StudyConfig:
        """Read a YAML file over a preset, with some settings over both. Nested settings are joined key by key.

        `size` is one of the preset `tiny`, which without it is `large`.
        """
        if size is not None and preset != TINY:
            raise SPDError(f"the preset {TINY!r} alone has sizes; leave the size out, or choose that preset")
        merged: dict[str, Any] = {} if preset is None else preset_settings(preset)
        merged = _joined(merged, {} if size is None else TINY_SIZES[size])
        over = overrides or {}
        if path is not None:
            file = read_yaml(path)
            one_protocol(_settings_of(file), _settings_of(over), f"study file {path}")
            merged = _joined(merged, file)
        return cls.make(_joined(merged, over))

    def to_yaml(self) -> str:
        """All settings, as `read` takes them."""
        return to_yaml(self)

    def cell(self, source: str, seed: int) -> SPDConfig:
        """What a method works from on one source with one seed."""
        return SPDConfig.make(
            {
                **self.settings,
                **self.source_settings.get(source, {}),
                "task": source,
                "task_options": self.task_options.get(source, {}),
                "eval_tasks": self.targets,
                "seed": seed,
            }
        )

    @classmethod
    def of_run(cls, run: SPDConfig) -> StudyConfig:
        """The study of one cell that a run is."""
        settings = {key: value for key, value in run.model_dump(mode="json").items() if key not in _OURS}
        return cls.make({
            "methods": [BASE, "spd"], "sources": [run.task], "targets": list(run.targets.values()), "seeds": [run.seed],
            "n_side_effects": 0, "task_options": {run.task: run.task_options}, "settings": settings,
        })  # fmt: skip

    @property
    def shared(self) -> SPDConfig:
        """The settings that all cells have in common (those of the first cell)."""
        return self.cell(self.sources[0], self.seeds[0])

    def task(self, name: str, data_dir: str | Path | None = None) -> Task:
        """A source or target by the name in the settings, as the protocol has it, with its data and options.

        `data_dir` is where its data are now; None: where they were.
        """
        settings, options = self.settings, self.task_options.get(name, {})
        chosen, form = protocol(settings["protocol"]), settings["prompt_format"]
        return chosen.task_for(name, data_dir or settings["data_dir"], options, form, source=name in self.sources)

    @property
    def trained(self) -> list[str]:
        """The methods that train, which is all but the base model."""
        return [method for method in self.methods if method != BASE]

    def n_scored(self, target: str) -> int:
        """Number of items of a target whose completions are scored."""
        return self.shared.n_test(target)

    def n_measured(self, target: str) -> int:
        """Number of items of a target measured teacher-forced; a larger draw begins with a smaller one."""
        if self.n_forced is None:
            return self.n_scored(target)
        return items_of("n_forced", self.n_forced, target)

    def extended(self, earlier: StudyConfig) -> list[str]:
        """One phrase for each difference from an earlier study, beyond methods and seeds that were added."""
        mine, theirs = self.model_dump(mode="json"), earlier.model_dump(mode="json")
        phrases = []
        for key in mine:
            if key in _GROWING:
                missing = [str(value) for value in theirs[key] if value not in mine[key]]
                phrases += [f"{key}: {', '.join(missing)} there and not now"] if missing else []
            elif isinstance(mine[key], dict) and isinstance(theirs[key], dict):
                both = {name: (theirs[key].get(name), mine[key].get(name)) for name in {**theirs[key], **mine[key]}}
                phrases += [f"{name}: {t!r} there, {m!r} now" for name, (t, m) in both.items() if differ(name, t, m)]
            elif differ(key, mine[key], theirs[key]):
                phrases.append(f"{key}: {theirs[key]!r} there, {mine[key]!r} now")
        return phrases

    def after(self, earlier: StudyConfig) -> StudyConfig:
        """The same study with the earlier one's methods and seeds in their order, and then its own new ones."""
        grown = {
            key: [*getattr(earlier, key), *(v for v in getattr(self, key) if v not in getattr(earlier, key))]
            for key in _GROWING
        }
        return self.model_copy(update=grown)

    def _check_names(self) -> None:
        from spd_lens import methods  # they import torch, which reading settings does not need

        for method in self.methods:
            methods.get(method)
        names = {*self.sources, *self.targets}
        for kind, keys in (("task_options", self.task_options), ("source_settings", self.source_settings)):
            if unknown := [key for key in keys if key not in (names if kind == "task_options" else self.sources)]:
                raise SPDError(f"{kind} names {unknown[0]!r}, which is not a task of this study")
        for source, settings in self.source_settings.items():
            _refuse(settings, f"source_settings of {source}")
            if wrong := [key for key in settings if key in _ONE_FOR_ALL]:
                raise SPDError(f"setting {wrong[0]!r} is the same for all sources; write it under settings")
        for name in names:
            self.task(name)
        for target in self.shared.targets:
            self.n_scored(target), self.n_measured(target)
        if BASE in named(self.sources):
            raise SPDError(f"a source called {BASE!r} would share its folder with the base model; rename its file")


def preset_names() -> list[str]:
    """Names of the ready-made studies."""
    folder = resources.files("spd_lens.study.presets")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a ready-made study; `SPDError` that lists the names if there is none."""
    if name not in preset_names():
        raise SPDError(f"unknown preset {name!r}; choose from {', '.join(preset_names())}")
    with resources.as_file(resources.files("spd_lens.study.presets") / f"{name}.yaml") as path:
        return read_yaml(path)


def may_project(method: str) -> bool:
    """Whether a method generates under a projection, as far as can be known before it does."""
    from spd_lens import methods  # they import torch

    return type(methods.get(method)).projection is not methods.Method.projection


def _refuse(settings: Mapping[str, Any], where: str) -> None:
    if ours := [key for key in settings if key in _OURS]:
        raise SPDError(
            f"setting {ours[0]!r} does not belong under {where}: a study sets it itself, from methods, sources, "
            "targets, seeds and task_options"
        )


def _of_protocol(chosen: Protocol, given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The methods and the sizes of each source that a protocol has, where the study's own settings say nothing."""
    found: dict[str, Any] = {}
    if chosen.methods and "methods" not in given:
        found["methods"] = list(chosen.methods)
    by_source, sources = given.get("source_settings", {}), given.get("sources", ["gsm8k"])
    if chosen.sizes and isinstance(by_source, dict) and isinstance(sources, list):
        own = {source: dict(by_source.get(source, {})) for source in map(str, sources)}
        for source, known in own.items():
            sizes = chosen.sizes_for(source, [], 0)
            known |= {name: n for name, n in sizes.items() if name not in known and name not in settings}
        found["source_settings"] = {**by_source, **{source: known for source, known in own.items() if known}}
    return found


def _settings_of(study: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = study.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _joined(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(under)
    for key, value in over.items():
        old = joined.get(key)
        joined[key] = _joined(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return joined
