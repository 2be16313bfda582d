"""`spd-lens analyze NAME RUN…`: finds the analysis and hands it the rest of the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from spd_lens.errors import SPDError
from spd_lens.output import single_command, start


class Analysis(NamedTuple):
    """An analysis command."""

    module: str
    """Where its `main` is, in this package."""
    question: str


ANALYSES: dict[str, Analysis] = {
    "spectra": Analysis("spectra.command", "how low-rank are the gradients: singular values, effective ranks, nulls"),
    "overlap": Analysis("overlap.command", "do two subspaces hold each other's gradients, by site and head"),
    "rank_sweep": Analysis("sweeps.ranks", "what each rank costs and brings, against random subspaces"),
    "layer_sweep": Analysis("sweeps.layers", "the same for layers and kinds; recommends layers and rank"),
    "heads": Analysis("heads.command", "layer × head maps of gradient energy and of the effect of projecting one head"),
    "directions": Analysis("directions.command", "what singular directions read and write, in tokens"),
    "tokens": Analysis("tokens.command", "where in the text the gradient sits"),
    "calibration_size": Analysis("calibration.size", "how many examples a subspace needs, and what spoils it"),
    "corpora": Analysis(
        "corpora.command", "what each method wrote on the same prompts, side by side, and how their corpora differ"
    ),
    "sampling_sweep": Analysis(
        "corpora.sampling_sweep",
        "what temperature and top-p do to completions and scores, with the projection and without",
    ),
    "drift": Analysis("distilled.drift", "the subspace after distillation against the one before"),
    "tables": Analysis("paper.tables", "the paper's tables 1-5 and figure 4 from studies (`tables 1 STUDY`)"),
}
"""Every analysis command, in the order in which a reader asks; none is imported for the list."""


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
    module = importlib.import_module(f".{ANALYSES[name].module}", package=__package__)
    start(single_command(module.main), arguments[1:], on_interrupt="what it had saved stays")
