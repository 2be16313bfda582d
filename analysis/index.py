"""`spd-lens analyze NAME RUN…`: finds the analysis and hands it the rest of the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from spd_lens.console import single_command, start
from spd_lens.errors import SPDError

ANALYSES: dict[str, str] = {
    "spectra": "how low-rank are the gradients: singular values, effective ranks, nulls",
    "overlap": "do two subspaces hold each other's gradients, by site and head",
    "rank_sweep": "what each rank costs and brings, against random subspaces",
    "layer_sweep": "the same for layers and kinds; recommends layers and rank",
    "heads": "layer × head maps of gradient energy and of the effect of projecting one head",
    "directions": "what singular directions read and write, in tokens",
    "tokens": "where in the text the gradient sits",
    "calibration_size": "how many examples a subspace needs, and what spoils it",
    "corpora": "what each method wrote on the same prompts, side by side, and how their corpora differ",
    "sampling_sweep": "what temperature and top-p do to completions and scores, with the projection and without",
    "drift": "the subspace after distillation against the one before",
    "tables": "the paper's tables 1-5 and figure 4 from studies (`tables 1 STUDY`)",
}
"""The question of every analysis command, in the order in which a reader asks. Read without importing them."""


def analyze(arguments: Sequence[str]) -> None:
    """Run one analysis; without arguments, list them."""
    if not arguments or arguments[0] in ("--help", "-h"):
        table = Table("analysis", "question", title="spd-lens analyze NAME RUN…  (NAME --help for its options)")
        for name, question in ANALYSES.items():
            table.add_row(name.replace("_", "-"), question)
        Console().print(table)
        return
    name = arguments[0].replace("-", "_")
    if name not in ANALYSES:
        raise SPDError(f"unknown analysis {arguments[0]!r}; choose from {', '.join(ANALYSES).replace('_', '-')}")
    module = importlib.import_module(f".{name}", package=__package__)
    start(single_command(module.main), arguments[1:], on_interrupt="what it had saved stays")
