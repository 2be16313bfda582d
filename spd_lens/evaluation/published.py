"""What is published of a base model, beside what was measured: the gate before anything is read into a method's gain.

A base that scores far below what the same model is known to do was asked or read in another way, and what a method then
gains may be format, or stopping at the right place. The numbers and their sources are in `published.yaml`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from spd_lens.output import markdown
from spd_lens.stats import Estimate

LOSS_TASKS = ("codealpaca",)
"""Tasks whose published measure is the loss of the reference in nats per token, where lower is better."""
FAR_POINTS = 10.0
FAR_SHARE = 0.25
"""A base is far below a published accuracy if the upper end of its interval is lower by more than so many percentage
points *and* by more than this share of it: 49.6 % is far above [6, 19] and [20, 36], but not above [24, 38]."""
REFERENCE = "reference"
"""The prompt and the scoring of the reference code, as `published.yaml` and the tasks' options call them."""
_COPY = re.compile(r"[-.](gguf|awq|gptq|nf4|fp8|fp16|f16|bf16|f32|fp32|int[48]|[48]-?bits?|bnb|i?q\d(-[a-z0-9]+)*)$")
"""What is at the end of the name of a model's copy: how its weights are stored."""


@dataclass(frozen=True)
class Format:
    """How a model was asked and how its answers were read; None where that is not known."""

    shots: int | None = None
    """Examples in the prompt."""
    prompt: str | None = None
    """`chat`, `raw`, `verbatim`, or `reference`: the reference code's text, as it is."""
    scoring: str | None = None

    @classmethod
    def here(cls, prompt_format: str | None, options: Mapping[str, Any]) -> Format:
        """The format of an evaluation of this project: `prompt_format` as it was resolved, and the task's options."""
        reference = prompt_format == "verbatim" and options.get("prompt_template") == REFERENCE
        scoring = REFERENCE if options.get("scoring") == REFERENCE else "the task's own scoring"
        return cls(0, REFERENCE if reference else prompt_format, scoring)

    def comparable(self, other: Format) -> bool:
        """Whether numbers of the two can be compared: no examples, the same kind of prompt, and the reference code's
        scoring on both sides or on neither."""
        alike = self.shots == other.shots == 0 and self.prompt == other.prompt is not None
        return alike and (self.scoring == REFERENCE) == (other.scoring == REFERENCE)

    def __str__(self) -> str:
        """Such as `zero-shot, chat prompt, lighteval`."""
        shots = None if self.shots is None else f"{self.shots}-shot" if self.shots else "zero-shot"
        prompt = "the reference code's prompt" if self.prompt == REFERENCE else self.prompt and f"{self.prompt} prompt"
        scoring = "the reference code's scoring" if self.scoring == REFERENCE else self.scoring
        parts = [shots or "shots not stated", prompt or "prompt not stated", scoring]
        if shots is None and prompt is None:
            parts[:2] = ["shots and prompt not stated"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Baseline:
    """A published number of a base model."""

    model: str
    """The model's name, as it was published."""
    task: str
    value: float
    """Percent of right answers; of `LOSS_TASKS` nats per token."""
    format: Format
    source: str
    checked: bool = True
    """Whether the number was compared with its source."""

    @property
    def caveat(self) -> str:
        """What has to be said with a number that was not compared with its source; empty where it was."""
        return "" if self.checked else "; not checked against the source"


@dataclass(frozen=True)
class Measured:
    """What an evaluation found of the base model, and how it was made."""

    value: Estimate
    """Of `LOSS_TASKS` the completion loss in nats per token; of others accuracy, from 0 to 1."""
    format: Format

    def text(self, task: str) -> str:
        """Such as `11.0 [6.3, 18.6]`, in percent where the measure is accuracy."""
        if task in LOSS_TASKS:
            return self.value.interval
        value, low, high = (f"{100 * end:.1f}" for end in (self.value.value, self.value.low, self.value.high))
        return f"{value} [{low}, {high}]" if self.value.bounded else f"{value} [no interval]"


def known_as(*names: str | None) -> str | None:
    """The name under which results of a model are known, from names that it goes by; None where none is known.

    Of a hub name, a directory or a file only the last part counts, whoever publishes it, in whatever case, and without
    what a quantised copy adds to it. Of a file in the hub's cache the repository's name counts, too.
    """
    _, models = _table()
    spelled = [form for name in names if name for form in (name, *re.findall(r"models--[^/\\]*?--([^/\\]+)", name))]
    return next((models[plain] for name in spelled if (plain := _plain(name)) in models), None)


def published(model: str, task: str) -> list[Baseline]:
    """What is published of a model on a task, in the order of `published.yaml`; empty where nothing is known.

    Args:
        model: Hub name, directory, file or the model's plain name; see `known_as`.
        task: The task's name. A file of one's own is none of the published ones, whatever its name.
    """
    rows, _ = _table()
    return rows.get((known_as(model) or "", task), [])


@dataclass(frozen=True)
class Subject:
    """Which published model an evaluated one is."""

    name: str
    by_its_files: bool = False
    """Whether only the model's own files say so, and not the name that it was loaded by."""

    @classmethod
    def of(cls, model: str, given: str | None = None, noted: str | None = None) -> Subject | None:
        """The published model that is meant; None where nothing is known of it.

        Args:
            model: The setting `model`.
            given: The setting `published_name`, which takes precedence.
            noted: What the notes of a run or a study say of a local model.
        """
        if (name := known_as(given or model)) is not None:
            return cls(name)
        name = None if given else known_as(noted)
        return None if name is None else cls(name, by_its_files=True)

    @property
    def caveat(self) -> str:
        """What has to be said once beside its numbers; empty where its name is certain."""
        says = f"That the model is {self.name} is what its own files say; one that was trained since is another."
        return says if self.by_its_files else ""

    def warning(self, task: str, measured: Measured) -> str | None:
        """A sentence where the measured base is far below what is published of it on a task; None elsewhere."""
        return warning(published(self.name, task), measured)

    def beside(self, task: str, measured: Measured) -> list[str]:
        """Markdown lines: the measured base and what is published of it on a task, each with its format, and a warning
        if there is one. Numbers of the same format come first. Empty where nothing is published."""
        found = published(self.name, task)
        if not found:
            return []
        alike = [row for row in found if row.format.comparable(measured.format)]
        rows = [[f"**{measured.text(task)}**", str(measured.format), "**here**"]]
        for row in [*alike, *(row for row in found if row not in alike)]:
            mark = " (**the same format**)" if row in alike else ""
            rows.append([f"{row.value:g}", f"{row.format}{mark}", row.source + row.caveat])
        what = "loss of the reference (nats per token)" if task in LOSS_TASKS else "accuracy (%)"
        says = "" if alike else ", none of it in the format used here"
        lines = [f"The base model's {what} on {task}, and what is published of {self.name}{says}:", ""]
        lines += markdown(["base model", "format", "source"], rows)
        if (text := self.warning(task, measured)) is not None:
            lines += ["", f"**{text}**"]
        return lines


def models_published() -> list[str]:
    """The names of all models of which something is known."""
    return list(dict.fromkeys(model for model, _ in _table()[0]))


def own_names(model: str, config: Any) -> list[str]:
    """Names that a local model says of itself: in its directory's `config.json`, or in the metadata of its GGUF file.

    Args:
        model: The model as the settings name it.
        config: Its configuration, which keeps `general.name` of a GGUF file.
    """
    names = [getattr(config, "_model_name_or_path", None)]
    try:
        written = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
        names.append(written.get("_name_or_path"))
    except (OSError, ValueError, AttributeError):
        pass  # a hub name, a file, or a directory that says nothing
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and name]


def warning(found: Sequence[Baseline], measured: Measured) -> str | None:
    """A sentence where the measured base is far below what the model is known to do in any format; None elsewhere.

    Losses of different prompts say nothing of each other, so there is none for `LOSS_TASKS`. Neither is there one where
    the items are too few for an interval.
    """
    scores = [row for row in found if row.task not in LOSS_TASKS]
    if not scores:
        return None
    best = max(scores, key=lambda row: row.value)
    below = best.value - 100 * measured.value.high  # -inf without an interval
    if not below > max(FAR_POINTS, FAR_SHARE * best.value):
        return None
    return (
        f"The base scores {measured.text(best.task)} % here ({measured.format}); {best.value:g} % is published "
        f"({best.format}{best.caveat}). Much of what a method gains may be format or stopping."
    )


def _plain(name: str) -> str:
    """The last part of a name, in small letters and with hyphens for spaces, without a copy's number format."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].strip().lower()
    last = re.sub(r"[\s_]+", "-", last)
    while (shorter := _COPY.sub("", last)) != last:
        last = shorter
    return last


@functools.cache
def _table() -> tuple[dict[tuple[str, str], list[Baseline]], dict[str, str]]:
    """Baselines by model and task, and models by the plain forms of their names."""
    text = resources.files("spd_lens.evaluation").joinpath("published.yaml").read_text(encoding="utf-8")
    rows: dict[tuple[str, str], list[Baseline]] = {}
    models: dict[str, str] = {}
    for entry in yaml.safe_load(text):
        form = Format(entry.get("shots"), entry.get("prompt"), entry.get("scoring"))
        for model, values in entry["results"].items():
            for name in (model, *entry.get("also", {}).get(model, [])):
                models[_plain(name)] = model
            for task, value in values.items():
                row = Baseline(model, task, float(value), form, entry["source"], entry.get("checked", True))
                rows.setdefault((model, task), []).append(row)
    return rows, models
