"""What `spd-lens study` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from spd_lens.errors import SPDError
from spd_lens.study.config import StudyConfig, preset_names
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from spd_lens.study.plan import make_plan
from spd_lens.study.shapes import read_shape


def study(
    file: Path | None, preset: str | None, out: Path, settings: Sequence[str], *, dry_run: bool, console: Console
) -> None:
    """Run a study of a file, a preset, or a file over a preset; or print its plan, with seconds measured so far."""
    if file is None and preset is None:
        raise SPDError(f"give a study's YAML file, or --preset with one of {', '.join(preset_names())}")
    config = StudyConfig.read(file, preset=preset, overrides=overrides(settings))
    if dry_run:  # it needs no weights, and for known models no network
        config = Study(out).admits(config)
        plan = make_plan(config, read_shape(config.settings["model"]), measured=Study(out).measured())
        console.print(Markdown(plan.to_markdown()))
        return
    done = run_study(config, out)
    console.print(Markdown((done.path / "report.md").read_text(encoding="utf-8")))
    console.print(f"Everything is in {out}; report.html is the page to read.", highlight=False, markup=False)


def overrides(settings: Sequence[str]) -> dict[str, Any]:
    """Settings from `KEY=VALUE` texts with values in YAML; `settings.lr=1e-4` and the like reach into nested ones."""
    found: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise SPDError(f"--set {text!r} must be KEY=VALUE, as in seeds=[1,2] or settings.n_train=64")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SPDError(f"--set {text!r}: {value!r} is no value in YAML") from error
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise SPDError(f"--set {text!r} reaches into {parent!r}, which another --set gives a value")
        place[last] = parsed
    return found
