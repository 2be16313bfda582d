"""The plan of a study: its units of work in order, and what they cost in tokens, operations, time and memory.

Costs are upper bounds where completions may end early, and estimates everywhere; seconds that were measured replace
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from spd_lens.output import markdown
from spd_lens.study.config import BASE, StudyConfig, may_project, named
from spd_lens.study.costs import Cost, Costs, Machine, Unit, bytes_per_weight
from spd_lens.study.shapes import Shape

HEAD = (
    "stage", "units", "tokens", "PFLOP", "TB moved", "time", "memory in GB", "held in main memory in GB",
)  # fmt: skip
STAGES = ("extract", "generate", "finetune", "measure", "side effects", "score")
Measured = Mapping[str, Mapping[str, float]]
"""For each stage, the measured `seconds`, and the estimated seconds of the same units (`work`)."""


def schedule(config: StudyConfig) -> list[Unit]:
    """All units of a study in the order in which they are done.

    The base model first; then all projections, which need the lens model; then seed by seed, so that a study that was
    stopped early has whole seeds.
    """
    targets, sources = list(config.shared.targets), list(named(config.sources))
    side = ["all"] if config.n_side_effects else []
    units = [Unit("measure", method=BASE, target=target) for target in targets]
    units += [Unit("side effects", method=BASE) for _ in side]
    units += [Unit("score", method=BASE, target=target) for target in targets]
    projecting = [method for method in config.trained if may_project(method)]
    units += [Unit("extract", s, m, seed) for s in sources for m in projecting for seed in config.seeds]
    phases = [("trained", config.trained), *([("projected", projecting)] if config.score_projected else [])]
    for seed in config.seeds if config.trained else []:
        for source in sources:
            units += [Unit("generate", source, method, seed) for method in config.trained]
            units += [Unit("finetune", source, method, seed) for method in config.trained]
            units += [Unit("measure", source, seed=seed, target=target) for target in targets]
            units += [Unit("side effects", source, seed=seed) for _ in side]
            for phase, names in phases:
                units += [Unit("score", source, name, seed, target, phase) for name in names for target in targets]
    return units


def unit_costs(config: StudyConfig, shape: Shape, machine: Machine) -> dict[Unit, Cost]:
    """What each unit costs."""
    costs = Costs(config, shape, machine)
    return {unit: costs.of(unit) for unit in schedule(config)}


class Row(NamedTuple):
    """One stage of a plan: what all units take together, and the memory of the largest, on each device."""

    stage: str
    n_units: int
    cost: Cost
    measured: bool
    """Whether the seconds come from units of this stage that were measured."""


class Plan(NamedTuple):
    """What a study would do and cost."""

    config: StudyConfig
    shape: Shape
    machine: Machine
    rows: list[Row]
    devices: int = 1
    """Devices that hold the model, each some of its layers."""

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(row.cost.seconds for row in self.rows)

    @property
    def memory(self) -> float:
        """Bytes of each device in the stage that needs most."""
        return max(row.cost.memory for row in self.rows)

    def to_markdown(self) -> str:
        """The plan as Markdown."""
        config = self.config
        lines = [
            f"# Plan: {len(config.trained)} methods x {len(config.sources)} sources x {len(config.seeds)} seeds, "
            f"{len(config.targets)} targets",
            "",
            f"- model: {self.shape}",
            f"- methods: {BASE}, {', '.join(config.trained)}; seeds: {', '.join(map(str, config.seeds))}",
        ]
        for name in config.sources:
            cell = config.cell(name, config.seeds[0])
            lines.append(
                f"- source {name}: {cell.n_calibration} calibration examples, {cell.n_train} prompts of up to "
                f"{cell.max_new_tokens} new tokens, {'at most ' * cell.early_stop}{cell.epochs} epochs at {cell.lr:g}"
            )
        for name in config.shared.targets:
            n_measured, n_scored = config.n_measured(name), config.n_scored(name)
            lines.append(f"- target {name}: {n_measured} items measured teacher-forced, {n_scored} scored")
        table = [
            [stage, n, f"{cost.tokens:,.0f}", f"{cost.flops / 1e15:,.3g}", f"{cost.moved / 1e12:,.3g}",
             duration(cost.seconds) + ", measured rate" * measured, f"{cost.memory / 1e9:.1f}",
             f"{cost.host / 1e9:.1f}"] for stage, n, cost, measured in self.rows
        ]  # fmt: skip
        shared = f", on each of {self.devices} devices with some of the layers each" if self.devices > 1 else ""
        return "\n".join([
            *lines, "", *markdown(HEAD, table, "---:"), "",
            f"In all about {duration(self.seconds)} at most, and {self.memory / 1e9:.1f} GB in the stage that needs "
            f"most{shared}. Every completion is counted at its token limit; what ends earlier saves time.", "",
            f"Assumed: {self.machine}. Lengths of prompts and gold completions are typical ones of each task. Measured "
            "seconds replace the assumption, stage by stage, once a study has begun.",
        ]) + "\n"  # fmt: skip


def make_plan(
    config: StudyConfig, shape: Shape, machine: Machine | None = None, measured: Measured | None = None
) -> Plan:
    """Units, tokens, operations, memory and time of each stage.

    The model is spread over as few devices as hold it, each with some of its layers. One of them computes at a time, so
    that they add memory and no speed.

    Args:
        config: The study.
        shape: The shape of its model.
        machine: What to assume; by default chosen by the setting `device`.
        measured: `Study.measured()` of a study with these settings that has begun.
    """
    dtype, device = config.settings["dtype"], config.settings["device"]
    machine = machine or Machine.assumed(device, bytes_per_weight(dtype, device))
    by_unit, rows = unit_costs(config, shape, machine), []
    numbers = range(1, shape.n_layers + 1)
    fits = (n for n in numbers if all(cost.on(n) <= machine.memory for cost in by_unit.values()))
    devices = next(fits, shape.n_layers)
    for stage in STAGES:
        if costs := [cost for unit, cost in by_unit.items() if unit.stage == stage and cost.tokens]:
            factor = rate((measured or {}).get(stage, {}))
            total = Cost(
                tokens=sum(cost.tokens for cost in costs),
                seconds=sum(cost.seconds for cost in costs) * (factor or 1),
                memory=max(cost.on(devices) for cost in costs),
                flops=sum(cost.flops for cost in costs),
                moved=sum(cost.moved for cost in costs),
                host=max(cost.host for cost in costs),
            )
            rows.append(Row(stage, len(costs), total, measured=factor is not None))
    return Plan(config, shape, machine, rows, devices)


def rate(measured: Mapping[str, float]) -> float | None:
    """Measured seconds per second that was foreseen; None before there is a measurement."""
    return measured["seconds"] / measured["work"] if measured.get("work") and measured.get("seconds") else None


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2.5 h` or `4.1 days`."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def remaining(costs: Mapping[Unit, Cost], measured: Measured, units: Iterable[Unit]) -> str:
    """How long the units that are left will take, from the measured units of the same stage.

    A phrase such as `about 4 min left`; it says `at least` while some stage was never measured.
    """
    rates = {stage: rate(entry) for stage, entry in measured.items()}
    left = [unit for unit in units if costs[unit].seconds]
    known = sum(costs[unit].seconds * (rates.get(unit.stage) or 0) for unit in left)
    unmeasured = dict.fromkeys(unit.stage for unit in left if not rates.get(unit.stage))
    if not unmeasured:
        return f"about {duration(known)} left"
    return (
        f"at least {duration(known)} left ({', '.join(unmeasured)} not yet measured)" if known else "time left unknown"
    )
