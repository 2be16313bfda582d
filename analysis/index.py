"""`spd-lens analyze NAME RUN…`: finds the analysis and hands it the rest of the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from spd_lens.errors import SPDError
from spd_lens.output import Console, single_command, start


class Analysis(NamedTuple):
    """An analysis command."""

    module: str
    """The module that has its `main`; one of this package begins with a dot."""
    question: str


ANALYSES: dict[str, Analysis] = {}
"""Every analysis command, in the order in which a reader asks; none is imported for the list."""


def register(name: str, module: str, question: str) -> None:
    """List an analysis for `spd-lens analyze`: see docs/extending.md.

    Raises `SPDError` for a name that another analysis has.
    """
    found = Analysis(module, question)
    if ANALYSES.setdefault(name.replace("-", "_"), found).module != module:
        raise SPDError(f"there is already an analysis called {name!r}; give yours another name")


register("spectra", ".spectra.command", "how low-rank are the gradients: singular values, effective ranks, nulls")
register("overlap", ".overlap.command", "do two subspaces hold each other's gradients, by site and head")
register("rank-sweep", ".sweeps.ranks", "what each rank costs and brings, against random subspaces")
register("layer-sweep", ".sweeps.layers", "the same for layers and kinds; recommends layers and rank")
register("heads", ".heads.command", "layer × head maps of gradient energy and of what projecting one head changes")
register("directions", ".directions.command", "what singular directions read and write, in tokens")
register("tokens", ".tokens.command", "where in the text the gradient sits")
register("calibration-size", ".calibration.size", "how many examples a subspace needs, and what spoils it")
register(
    "corpora",
    ".corpora.command",
    "what each method wrote on the same prompts, side by side, and how their corpora differ",
)
register(
    "sampling-sweep",
    ".corpora.sampling_sweep",
    "what temperature and top-p do to completions and scores, with the projection and without",
)
register("drift", ".distilled.drift", "the subspace after distillation against the one before")
register(
    "gain",
    ".gain.command",
    "where a change of the score comes from: stopping, format or the rest; which factor moves it",
)
register(
    "estimators",
    ".estimators.command",
    "which estimator's directions do good, at equal damage, against random ones and the paper's",
)
register("tables", ".paper.tables", "the paper's tables 1-5 and figure 4 from studies (`tables 1 STUDY`)")


def analyze(arguments: Sequence[str]) -> None:
    """Run one analysis; without arguments, list them."""
    if not arguments or arguments[0] in ("--help", "-h"):
        table = Table("analysis", "question", title="spd-lens analyze NAME RUN…  (NAME --help for its options)")
        for name, found in ANALYSES.items():
            table.add_row(name.replace("_", "-"), found.question)
        Console().print(table)
        return
    name = arguments[0].replace("-", "_")
    if name not in ANALYSES:
        raise SPDError(f"unknown analysis {arguments[0]!r}; choose from {', '.join(ANALYSES).replace('_', '-')}")
    module = importlib.import_module(ANALYSES[name].module, package=__package__)
    start(single_command(module.main), arguments[1:], on_interrupt="what it had saved stays")
