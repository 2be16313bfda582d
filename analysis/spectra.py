"""How low-rank are the gradients? The command, and what it is made of, for notebooks.

`spectrum`, `effective_ranks` and `activation_kept` take moments and return tables; figures are in `spectra_figures`.
"""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from spd_lens.capture import extract
from spd_lens.controls import shuffled_answers
from spd_lens.errors import SPDError
from spd_lens.moments import GradientMoments
from spd_lens.statistics import difference_sentence
from spd_lens.storage import is_made

from . import spectra_figures as draw
from .command import Findings, analysis, run
from .inputs import Subject
from .spectra_measures import (
    ACTIVATIONS,
    CENTRED,
    GRADIENTS,
    SHUFFLED,
    SOURCES,
    activation_kept,
    effective_ranks,
    headline,
    rank_difference,
    spectrum,
)

__all__ = ["activation_kept", "effective_ranks", "headline", "main", "rank_difference", "shuffled_moments", "spectrum"]


def shuffled_moments(subject: Subject, moments: GradientMoments, seed: int = 0) -> GradientMoments:
    """Moments of the run's calibration examples with shuffled answers: extracted once, kept in `analysis/`."""
    path = subject.folder / f"moments-shuffled-{seed}.safetensors"
    if not is_made(path, GradientMoments.load):
        config = subject.run.config
        layers = sorted({site.layer for site in moments.sites})
        wrong = subject.task.kept("calibration", shuffled_answers(subject.calibration(), seed))
        extract(
            subject.pair, wrong, layers=layers, kinds=config.kinds, loss=config.loss, engine=config.engine,
            progress=subject.progress,
        ).save(path)  # fmt: skip
    return GradientMoments.load(path)


@analysis()
def main(
    subject: Subject,
    *,
    shuffled: Annotated[bool, typer.Option(help="Extract gradients of shuffled answers too.")] = True,
    all_layers: Annotated[bool, typer.Option(help="Effective ranks at every layer too; extracts them once.")] = False,
    draws: Annotated[int, typer.Option(min=20, help="Random subspaces for the range of chance.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffling and of the random subspaces.")] = 0,
) -> Findings:
    """How low-rank the gradients are: spectra, effective ranks and kept activation energy, with their nulls."""
    moments = subject.moments
    sources = {source: moments for source in (GRADIENTS, ACTIVATIONS, CENTRED)}
    says = []
    if shuffled:
        try:
            sources[SHUFFLED] = shuffled_moments(subject, moments, seed)
        except SPDError as error:  # most examples have one and the same answer
            Console().print(f"shuffled answers left out: {error}", highlight=False, markup=False)
    spectra, ranks = [], []
    for per_head in (True, False):
        for source in SOURCES:
            if source in sources:
                spectra.append(spectrum(sources[source], per_head=per_head, source=source))
                ranks.append(effective_ranks(sources[source], per_head=per_head, source=source))
    curves, table = pd.concat(spectra, ignore_index=True), pd.concat(ranks, ignore_index=True)
    kept = pd.concat([activation_kept(moments, per_head=p, draws=draws, seed=seed) for p in (True, False)])
    says.append(headline(table[table["head"] != "all"]))
    if SHUFFLED in sources:
        change = rank_difference(sources[GRADIENTS], sources[SHUFFLED])
        measure = "Entropy rank of gradients of right and of shuffled answers"
        says.append(difference_sentence(change, measure=measure, first="shuffled", second="right"))
    says.append(draw.kept_sentence(kept, subject.run.config.rank))
    text = " ".join(says)
    facts: dict[str, Any] = {
        "shards": moments.n_shards, "examples": int(moments.n_examples.sum()), "seed": seed, "draws": draws,
        "intervals": "delete-half jackknife over shards, 95%",
    }  # fmt: skip
    figures = [
        draw.cumulative_figure(curves), draw.ranks_figure(table), draw.singular_figure(curves), draw.kept_figure(kept),
        draw.cumulative_figure(curves, per_head=False),
    ]  # fmt: skip
    if all_layers:
        everywhere = effective_ranks(subject.moments_everywhere())
        subject.save("spectra-layers", everywhere, **facts)
        figures.append(draw.layers_figure(everywhere))
    subject.save("spectra-ranks", table, **facts)
    subject.save("spectra-kept", kept, **facts)
    subject.save("spectra", curves, figures, says=text, **facts)
    return Findings(_table(table, subject.name), text, [subject.folder / "spectra.html"], "Figures")


def _table(table: pd.DataFrame, name: str) -> Table:
    shown = [source for source in SOURCES if source in set(table.source)]
    out = Table("site", "head", "width", *shown, title=f"directions that hold 90 % of the energy, {name}")
    chosen = table[table.measure == "rank of 90 % energy"]
    for (site, head), rows in chosen.groupby(["site", "head"], sort=False):
        cells = []
        for source in shown:
            for row in rows[rows.source == source].itertuples():
                interval = f" [{row.low:.1f}, {row.high:.1f}]" if source == GRADIENTS else ""
                cells.append(f"{row.value:.0f}{interval}")
        out.add_row(str(site), str(head), str(rows.width.iloc[0]), *cells)
    return out


if __name__ == "__main__":
    run(main)
