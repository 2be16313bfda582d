"""The plan of a study: its units of work in order, and what they cost in tokens, memory and time.

Costs follow from the settings and the model's shape alone. They are upper bounds where completions may end early, and
estimates everywhere; seconds that were measured replace them (`Clock`, and `make_plan` with `measured`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spd_lens import methods, tasks
from spd_lens.experiment import Experiment
from spd_lens.methods import Method
from spd_lens.study.config import BASE, StudyConfig, named
from spd_lens.study.costs import Cost, Costs, Machine, bytes_per_weight
from spd_lens.study.shapes import Shape

STAGES = ("extract", "generate", "finetune", "measure", "side effects", "score")
_SIDE_SETS, _SIDE_TOKENS = 4, 200
"""Sets of texts, and tokens of a text, that the plan supposes for side effects."""


@dataclass(frozen=True)
class Unit:
    """One piece of work of a stage. What does not apply is empty: the base model has no source and no seed."""

    stage: str
    source: str = ""
    method: str = ""
    seed: int | None = None
    target: str = ""
    phase: str = "trained"

    def __str__(self) -> str:
        parts = [self.method, self.target and f"on {self.target}", self.source and f"from {self.source}"]
        parts += ["" if self.seed is None else f"seed {self.seed}", "" if self.phase == "trained" else self.phase]
        return f"{self.stage}: {', '.join(part for part in parts if part)}"


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
    if not config.trained:
        return units
    phases = [("projected", projecting)] if config.score_projected else []
    for seed in config.seeds:
        for source in sources:
            units += [Unit("generate", source, method, seed) for method in config.trained]
            units += [Unit("finetune", source, method, seed) for method in config.trained]
            units += [Unit("measure", source, seed=seed, target=target) for target in targets]
            units += [Unit("side effects", source, seed=seed) for _ in side]
            for phase, names in (("trained", config.trained), *phases):
                units += [Unit("score", source, name, seed, target, phase) for name in names for target in targets]
    return units


def may_project(method: str) -> bool:
    """Whether a method generates under a projection, as far as can be known before it does."""
    return type(methods.get(method)).projection is not Method.projection


class _Asked(Exception):
    pass


class _Spy(Experiment):
    """Tells which moments a method would extract first, and stops it there; it has no model and no data."""

    pair: Any = None
    tasks: Any = None

    def moments(self, **asked: Any) -> Any:
        raise _Asked(tuple(sorted(asked.items())))


def extraction_of(config: StudyConfig, unit: Unit) -> tuple[Any, ...]:
    """What decides the extraction that a unit of stage `extract` needs: equal ones are done once."""
    assert unit.seed is not None
    source = named(config.sources)[unit.source]
    try:
        methods.get(unit.method).projection(_Spy(config.cell(source, unit.seed), unit.source))
    except _Asked as asked:
        options = dict(asked.args[0])
        return (unit.source, str(options), unit.seed if options.get("shuffled") else None)
    except (AttributeError, TypeError):
        pass  # it looks at the model first: suppose that it shares nothing
    return (unit.source, unit.method, unit.seed)


def unit_costs(config: StudyConfig, shape: Shape, machine: Machine) -> dict[Unit, Cost]:
    """What each unit costs."""
    sources = named(config.sources)
    targets = config.shared.targets
    lookup: dict[str, Callable[[Unit], Cost]] = {}
    known = {
        name: tasks.configured(name, config.settings["data_dir"], config.task_options.get(name, {}))
        for name in {*config.sources, *config.targets}
    }
    costs = Costs(shape, machine, config.shared)
    n_policies = len(config.trained) + sum(map(may_project, config.trained))
    extracted: set[Any] = set()

    def extract(unit: Unit) -> Cost:
        key = extraction_of(config, unit)
        if key in extracted:
            return Cost()
        extracted.add(key)
        name = sources[unit.source]
        return costs.extract(name, config.cell(name, config.seeds[0]))

    def by_source(cost: Callable[[str, Any], Cost]) -> Callable[[Unit], Cost]:
        return lambda unit: cost(sources[unit.source], config.cell(sources[unit.source], config.seeds[0]))

    def measure(unit: Unit) -> Cost:
        name = targets[unit.target]
        return costs.measure(config.n_measured(unit.target), costs.lengths(name), _policies(unit))

    def side_effects(unit: Unit) -> Cost:
        return costs.measure(_SIDE_SETS * config.n_side_effects, (0, _SIDE_TOKENS), _policies(unit))

    def _policies(unit: Unit) -> int:
        return 1 if unit.method == BASE else n_policies

    def score(unit: Unit) -> Cost:
        name = targets[unit.target]
        return costs.score(config.n_scored(unit.target), name, known[name].max_new_tokens)

    lookup = {
        "extract": extract,
        "generate": by_source(costs.generate),
        "finetune": by_source(costs.finetune),
        "measure": measure,
        "side effects": side_effects,
        "score": score,
    }
    return {unit: lookup[unit.stage](unit) for unit in schedule(config)}


@dataclass(frozen=True)
class Row:
    """One stage of a plan."""

    stage: str
    n_units: int
    cost: Cost
    """Tokens and seconds in all units, memory of the largest."""
    measured: bool
    """Whether the seconds come from units of this stage that were measured."""


@dataclass(frozen=True)
class Plan:
    """What a study would do and cost."""

    config: StudyConfig
    shape: Shape
    machine: Machine
    rows: list[Row]

    @property
    def seconds(self) -> float:
        return sum(row.cost.seconds for row in self.rows)

    @property
    def memory(self) -> float:
        """Bytes of the stage that needs most."""
        return max(sum(row.cost.memory.values()) for row in self.rows)

    def to_markdown(self) -> str:
        """The plan, readable."""
        config = self.config
        parts = list(dict.fromkeys(part for row in self.rows for part in row.cost.memory))
        lines = [
            f"# Plan: {len(config.trained)} methods x {len(config.sources)} sources x {len(config.seeds)} seeds, "
            f"{len(config.targets)} targets",
            "",
            f"- model: {self.shape}",
            f"- methods: {BASE}, {', '.join(config.trained)}; seeds: {', '.join(map(str, config.seeds))}",
            *(f"- source {name}: {_sizes(config, name)}" for name in config.sources),
            *(f"- target {name}: {_items(config, name)}" for name in config.shared.targets),
            "",
            "| stage | units | tokens | time |",
            "| --- | ---: | ---: | ---: |",
        ]
        for row in self.rows:
            time = f"{duration(row.cost.seconds)}{', measured rate' if row.measured else ''}"
            lines.append(f"| {row.stage} | {row.n_units} | {row.cost.tokens:,.0f} | {time} |")
        lines += [
            "",
            f"| memory in GB | {' | '.join(parts)} | all |",
            f"| --- | {' | '.join(['---:'] * (len(parts) + 1))} |",
        ]
        for row in self.rows:
            memory = [row.cost.memory.get(part) for part in parts]
            cells = ["-" if value is None else f"{value / 1e9:.2f}" for value in memory]
            lines.append(f"| {row.stage} | {' | '.join(cells)} | {sum(row.cost.memory.values()) / 1e9:.1f} |")
        lines += [
            "",
            f"In all about {duration(self.seconds)} at most, and {self.memory / 1e9:.1f} GB in the stage that needs "
            f"most. Every completion is counted at its token limit; what ends earlier saves time.",
            "",
            f"Assumed: {self.machine}. Lengths of prompts and gold completions are typical ones of each task. Measured "
            "seconds replace the assumption, stage by stage, once a study has begun.",
        ]
        return "\n".join(lines) + "\n"


def make_plan(
    config: StudyConfig,
    shape: Shape,
    machine: Machine | None = None,
    measured: Mapping[str, Mapping[str, float]] | None = None,
) -> Plan:
    """Units, tokens, memory and time of each stage.

    Args:
        config: The study.
        shape: Of its model.
        machine: What to assume; by default chosen by the setting `device`.
        measured: `Study.measured()` of a study with these settings that has begun.
    """
    dtype, device = config.settings["dtype"], config.settings["device"]
    machine = machine or Machine.assumed(device, bytes_per_weight(dtype, device))
    by_unit = unit_costs(config, shape, machine)
    rows = []
    for stage in STAGES:
        costs = [cost for unit, cost in by_unit.items() if unit.stage == stage and cost.tokens]
        if not costs:
            continue
        total = Cost.total(costs)
        seen = (measured or {}).get(stage, {})
        if factor := rate(seen):
            total = replace(total, seconds=total.seconds * factor)
        rows.append(Row(stage, len(costs), total, measured=bool(factor)))
    return Plan(config, shape, machine, rows)


def rate(measured: Mapping[str, float]) -> float | None:
    """Measured seconds per second that was foreseen; None before there is a measurement."""
    return measured["seconds"] / measured["work"] if measured.get("work") and measured.get("seconds") else None


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `2.5 h` or `4.1 days`."""
    for limit, unit, size in ((90, "s", 1), (90 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


@dataclass
class Clock:
    """How long the units that are left will take, from the measured units of the same stage."""

    costs: Mapping[Unit, Cost]
    measured: dict[str, dict[str, float]]

    def remaining(self, units: Iterable[Unit]) -> str:
        """A phrase: `about 4 min left`; `at least ...` while some stage was never measured; or `unknown`."""
        known, unmeasured = 0.0, []
        for unit in units:
            if not (work := self.costs[unit].seconds):
                continue
            factor = rate(self.measured.get(unit.stage, {}))
            if factor is None:
                unmeasured += [unit.stage] if unit.stage not in unmeasured else []
            else:
                known += work * factor
        if not unmeasured:
            return f"about {duration(known)} left"
        if not known:
            return "time left unknown"
        return f"at least {duration(known)} left ({', '.join(unmeasured)} not yet measured)"


def _sizes(config: StudyConfig, source: str) -> str:
    cell = config.cell(source, config.seeds[0])
    return (
        f"{cell.n_calibration} calibration examples, {cell.n_train} prompts of up to {cell.max_new_tokens} new tokens, "
        f"{cell.epochs} epochs at {cell.lr:g}"
    )


def _items(config: StudyConfig, target: str) -> str:
    return f"{config.n_measured(target)} items measured teacher-forced, {config.n_scored(target)} scored"
