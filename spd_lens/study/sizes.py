"""The size, small, medium or large, at which this machine makes the demo and the study `tiny` in a few minutes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_lens.runs import DEMO_SIZES, Run, Size, SPDConfig
from spd_lens.settings import DEFAULT_MODEL
from spd_lens.study.config import TINY, TINY_SIZES, StudyConfig
from spd_lens.study.costs import Machine, run_seconds
from spd_lens.study.folder import Study
from spd_lens.study.plan import duration, make_plan
from spd_lens.study.shapes import read_shape

log = logging.getLogger(__name__)

DEMO_SECONDS, TINY_SECONDS = 5 * 60, 15 * 60
"""How long the demo and the study `tiny` may take."""
_START = 30
"""Seconds until a model is loaded and its lens model is compared with it, which no stage counts."""


def machine_size(device: str = "auto", dtype: str = "auto") -> Size:
    """The largest size, `small`, `medium` or `large`, at which this machine makes the demo in five minutes.

    For examples of one's own that should take minutes anywhere: `{"small": 8, "medium": 16, "large": 32}[size]`. To
    find it out takes a second or two, in which the machine multiplies matrices.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: As for `load`; `auto` is bfloat16 where the hardware multiplies it, else float32.
    """
    return largest(_in_all(demo_seconds(Machine.measured(device, dtype))), DEMO_SECONDS)


def largest(seconds: Mapping[Size, float], most: float) -> Size:
    """The last of some sizes in ascending order that takes no more than `most` seconds, else the first."""
    return next((size for size in reversed(list(seconds)) if seconds[size] <= most), next(iter(seconds)))


def demo_seconds(machine: Machine) -> dict[Size, dict[str, float]]:
    """The seconds that each stage of the demo is foreseen to take on a machine, by size."""
    shape = read_shape(DEFAULT_MODEL)
    return {size: run_seconds(SPDConfig.make(settings), shape, machine) for size, settings in DEMO_SIZES.items()}


def begin_demo(out: str | Path, size: Size | None = None) -> SPDConfig:
    """The demo's settings at a size, in a run directory where it is begun.

    Without a size it is the largest that this machine makes in `DEMO_SECONDS`. What it is foreseen to take is noted, so
    that the summary shows it beside what it took. A demo that was begun earlier keeps its sizes.

    Raises:
        SPDError: `out` holds something else, or the demo at another size than the one asked for.
    """
    sizes = {name: SPDConfig.make(settings) for name, settings in DEMO_SIZES.items()}
    run = Run(out)
    if size is None and not run.is_free and run.config_path.exists():
        earlier = run.config
        return next((config for config in sizes.values() if not earlier.differences(config)), sizes["large"])
    run.check(sizes[size or "small"])
    if size is not None:
        return sizes[size]
    machine = Machine.measured("auto", "auto")
    foreseen = demo_seconds(machine)
    size = _chosen(_in_all(foreseen), DEMO_SECONDS, machine)
    run = Run.open(out, sizes[size])
    run.note(foreseen={stage: round(seconds, 1) for stage, seconds in foreseen[size].items()})
    return sizes[size]


def sized_study(
    file: Path | None, preset: str | None, overrides: Mapping[str, Any], out: str | Path, size: Size | None = None
) -> StudyConfig:
    """`StudyConfig.read`; without a size, the preset `tiny` gets the largest that takes `TINY_SECONDS` on this machine.

    A study in `out` keeps its sizes.
    """
    if size is not None or preset != TINY:
        return StudyConfig.read(file, preset=preset, overrides=overrides, size=size)
    sizes = {name: StudyConfig.read(file, preset=preset, overrides=overrides, size=name) for name in TINY_SIZES}
    study = Study(out)
    if not study.is_free and study.config_path.exists():
        earlier = study.config
        return next((config for config in sizes.values() if not config.extended(earlier)), sizes["large"])
    settings = sizes["large"].settings
    machine, shape = Machine.measured(settings["device"], settings["dtype"]), read_shape(settings["model"])
    seconds = {name: make_plan(config, shape, machine).seconds + _START for name, config in sizes.items()}
    return sizes[_chosen(seconds, TINY_SECONDS, machine)]


def _in_all(seconds: Mapping[Size, Mapping[str, float]]) -> dict[Size, float]:
    return {size: _START + sum(stages.values()) for size, stages in seconds.items()}


def _chosen(seconds: Mapping[Size, float], most: float, machine: Machine) -> Size:
    """`largest`, said with its reason."""
    size = largest(seconds, most)
    others = ", ".join(f"{name} {duration(time)}" for name, time in seconds.items() if name != size)
    log.info(
        "size %s, foreseen to take %s on %s (%s); --size chooses by hand", size, duration(seconds[size]), machine.name,
        others,
    )  # fmt: skip
    return size
