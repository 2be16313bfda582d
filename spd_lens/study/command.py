"""What `spd-lens study` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from spd_lens.errors import SPDError, shortened
from spd_lens.runs import Size, parse_yaml
from spd_lens.study.cluster import Workers, assemble, here, on_ray, on_submitit, run_parts
from spd_lens.study.config import preset_names
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from spd_lens.study.plan import make_plan
from spd_lens.study.shapes import read_shape
from spd_lens.study.sizes import sized_study

_EXAMPLES = {
    "--set": "seeds=[1,2] or settings.n_train=64",
    "--worker": "num_gpus=1 (Ray) or slurm_partition=gpu (submitit)",
}


def study(
    file: Path | None,
    preset: str | None,
    out: Path,
    settings: Sequence[str],
    *,
    dry_run: bool,
    console: Console,
    workers: Workers | None = None,
    store: str | None = None,
    at_once: int | None = None,
    size: Size | None = None,
) -> None:
    """Run a study of a file, a preset, or a file over a preset; or print its plan, with seconds measured so far.

    With workers or a store it is made part by part; with a store alone, what is finished there is put together.
    """
    if file is None and preset is None:
        if store is None or workers is not None or settings or dry_run or size:
            raise SPDError(f"give a study's YAML file, or --preset with one of {', '.join(preset_names())}")
        done = assemble(store, out)
    else:
        config = sized_study(file, preset, overrides(settings), out, size)
        if dry_run:  # it needs no weights, and for known models no network
            config = Study(out).admits(config)
            plan = make_plan(config, read_shape(config.settings["model"]), measured=Study(out).measured())
            console.print(Markdown(plan.to_markdown(), hyperlinks=False))
            return
        if workers is None and store is None:
            done = run_study(config, out)
        else:
            done = run_parts(config, out, workers or here, store=store, at_once=at_once)
    report = (done.path / "report.md").read_text(encoding="utf-8")
    console.print(Markdown(report, hyperlinks=False))
    console.print(f"Everything is in {out}; report.html is the page to read.", highlight=False, markup=False)


def workers_of(ray: str | None, submitit: str | None, options: Sequence[str]) -> Workers | None:
    """The workers that flags name; None where they name none."""
    if ray is not None and submitit is not None:
        raise SPDError("give either --ray or --submitit: one of them does the work")
    if ray is None and submitit is None:
        if options:
            raise SPDError("--worker is about the workers of --ray or --submitit, and there are none")
        return None
    given = overrides(options, "--worker")
    return on_ray(ray, **given) if ray is not None else on_submitit(str(submitit), **given)


def overrides(settings: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """Settings from `KEY=VALUE` texts with values in YAML; `settings.lr=1e-4` and the like reach into nested ones."""
    found: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise SPDError(f"{flag} {text!r} must be KEY=VALUE, as in {_EXAMPLES[flag]}")
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise SPDError(f"{flag} {shortened(repr(text))} is no value in YAML: {error}") from error
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise SPDError(f"{flag} {text!r} reaches into {parent!r}, which another {flag} gives a value")
        place[last] = parsed
    return found
