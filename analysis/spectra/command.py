"""How low-rank are the gradients? The command."""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import typer
from rich.table import Table

from spd_lens.analysis.common import Findings, Subject, analysis, spectrum_note
from spd_lens.analysis.spectra import figures as draw
from spd_lens.analysis.spectra.measures import (
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
from spd_lens.output import terminal
from spd_lens.stats import difference_sentence


@analysis()
def main(
    subject: Subject,
    *,
    shuffled: Annotated[bool, typer.Option(help="Extract gradients of shuffled answers too.")] = True,
    all_layers: Annotated[bool, typer.Option(help="Effective ranks at every layer too; extracts them once.")] = False,
    draws: Annotated[int, typer.Option(min=20, help="Number of random subspaces for the range of chance.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffling and of the random subspaces.")] = 0,
) -> Findings:
    """How low-rank the gradients are: spectra, effective ranks and kept activation energy, with their nulls."""
    moments = subject.moments
    sources = {source: moments for source in (GRADIENTS, ACTIVATIONS, CENTRED)}
    if shuffled and (wrong := subject.shuffled_moments(seed)) is not None:
        sources[SHUFFLED] = wrong
    chosen = [
        (sources[source], {"per_head": per_head, "source": source})
        for per_head in (True, False) for source in SOURCES if source in sources
    ]  # fmt: skip
    curves = pd.concat([spectrum(of, **how) for of, how in chosen], ignore_index=True)
    table = pd.concat([effective_ranks(of, **how) for of, how in chosen], ignore_index=True)
    kept = pd.concat([activation_kept(moments, per_head=p, draws=draws, seed=seed) for p in (True, False)])
    says = [headline(table[table["head"] != "all"])]
    if SHUFFLED in sources:
        change = rank_difference(sources[GRADIENTS], sources[SHUFFLED])
        measure = "Entropy rank of gradients of right and of shuffled answers"
        says.append(difference_sentence(change, measure=measure, first="shuffled", second="right"))
    says.append(draw.kept_sentence(kept, subject.rank("")))
    says.append(spectrum_note(subject.subspace, of_gradients=True))
    text = " ".join(filter(None, says))
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
    chosen = table[table.measure == "rank of 90 % energy"]
    rows = []
    for (site, head), found in chosen.groupby(["site", "head"], sort=False):
        cells = []
        for source in shown:
            for row in found[found.source == source].itertuples():
                interval = f" [{row.low:.1f}, {row.high:.1f}]" if source == GRADIENTS else ""
                cells.append(f"{row.value:.0f}{interval}")
        rows.append([str(site), str(head), str(found.width.iloc[0]), *cells])
    title = f"directions that hold 90 % of the energy, {name}"
    return terminal(["site", "head", "width", *shown], rows, title=title)
