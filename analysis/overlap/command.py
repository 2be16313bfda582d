"""Do two subspaces hold each other's gradients? The command.

Moments are compared in `energy` and subspaces in `angles_table`; `transfer` sets overlap against what projections do to
losses.
"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any

import pandas as pd
import typer
from rich.table import Table

from spd_lens.analysis.common import Findings, Subject, analysis
from spd_lens.analysis.overlap import figures as draw
from spd_lens.analysis.overlap.angles_table import angle_table, compare_subspaces
from spd_lens.analysis.overlap.energy import energy_overlap, permutation_test
from spd_lens.analysis.overlap.transfer import transfer_figures, transfer_of, transfer_sentence
from spd_lens.errors import SPDError
from spd_lens.output import terminal
from spd_lens.subspaces import resolve_rank

CURVE = (1, 2, 4, 8, 16, 32, 64)
"""Ranks of the curves, as far as a block has them."""


@analysis(
    runs="Run directories, two or more; results go to the first.",
    together="an overlap needs two runs or more, for example runs/gsm8k runs/mbpp",
)
def main(
    found: list[Subject],
    *,
    rank: Annotated[
        str, typer.Option(help="Directions per block of maps and tests: a number or a fraction.")
    ] = "0.125",
    joint: Annotated[bool, typer.Option("--joint", help="Subspaces over all heads instead of per head.")] = False,
    shuffled: Annotated[bool, typer.Option(help="Gradients of shuffled answers beside them, as a null.")] = True,
    all_layers: Annotated[
        bool, typer.Option(help="A profile over all layers too; extracts them once per run.")
    ] = False,
    permutations: Annotated[int, typer.Option(min=19, help="Exchanges of shards between two domains.")] = 199,
    draws: Annotated[int, typer.Option(min=99, help="Random subspaces for p-values against chance.")] = 999,
    seed: Annotated[int, typer.Option(min=0, help="Seed of exchanges and random subspaces.")] = 0,
) -> Findings:
    """How much of each other's gradient energy the subspaces of several runs hold, and what that says on transfer."""
    subject, moments = found[0], {one.name: one.moments for one in found}
    subspaces = {one.name: one.estimated() for one in found}
    for one in found:
        one.say_estimator()
    settings: dict[str, Any] = {"per_head": not joint, "seed": seed}
    first = subject.moments
    site = first.sites[0]
    leading = resolve_rank(subject.rank(rank), first.width(site) // (1 if joint else first.n_heads[site]))
    nulls = {one.name: one.shuffled_moments(seed) for one in found} if shuffled else {}
    wrong = {name: null for name, null in nulls.items() if null is not None}
    energy = energy_overlap(moments, sorted({*CURVE, leading}), shuffled=wrong, draws=draws, **settings)
    tests, angles, cosines = [], [], []
    for a, b in combinations(moments, 2):
        pair = f"{a} – {b}"
        test = permutation_test(moments[a], moments[b], leading, permutations=permutations, **settings)
        tests.append(test.assign(a=a, b=b, pair=pair))
        both = [subspaces[name](leading, moments[name].sites, per_head=not joint) for name in (a, b)]
        angles.append(angle_table(*both, seed=seed).assign(a=a, b=b, pair=pair))
        cosines.append(compare_subspaces(*both, draws=draws, seed=seed).assign(a=a, b=b, pair=pair))
    exchanged = pd.concat(tests, ignore_index=True)
    figures = [
        draw.heat_map_figure(energy, leading), draw.energy_figure(energy), draw.exchange_figure(exchanged),
        draw.angles_figure(pd.concat(angles)),
    ]  # fmt: skip
    if not joint:
        figures.insert(1, draw.heat_map_figure(energy, leading, heads=True))
    says = [overlap_sentence(energy, exchanged, leading)]
    facts: dict[str, Any] = {
        "runs": list(moments), "rank": leading, "permutations": permutations, "draws": draws, **settings,
    }  # fmt: skip
    if all_layers:
        everywhere = {one.name: one.moments_everywhere() for one in found}
        by_layer = energy_overlap(everywhere, (leading,), draws=99, **settings)
        subject.save("overlap-layers", by_layer, **facts)
        figures.insert(1, draw.layers_figure(by_layer, leading))
    try:
        points = transfer_of(found)
    except SPDError as error:  # runs that were not evaluated on each other's tasks
        says.append(f"No transfer: {error}.")
    else:
        says.append(transfer_sentence(points))
        figures += transfer_figures(points)
        subject.save("overlap-transfer", points, **facts)
    subject.save("overlap-exchange", exchanged, **facts)
    subject.save("overlap-angles", pd.concat(cosines), **facts)
    text = " ".join(says)
    subject.save("overlap", energy, figures, says=text, **facts)
    return Findings(_table(energy, exchanged, leading), text, [subject.folder / "overlap.html"], "Figures")


def overlap_sentence(energy: pd.DataFrame, exchanged: pd.DataFrame, rank: int) -> str:
    """What the domains hold of each other at a rank, between chance and ceiling; and which differ."""
    mine = energy[(energy["rank"] == rank) & (energy.of == "domain")]
    nulls = energy[(energy["rank"] == rank) & (energy.of != "domain") & (energy.a == energy.b)]
    own, other = mine[mine.a == mine.b], mine[mine.a != mine.b]
    above = int((other.p_random < 0.05).sum())
    pairs = exchanged[exchanged.site == "all"]
    differ, same = (
        [f"{row.pair} (p = {row.p_permutation:.2g})" for row in some.itertuples()]
        for some in (pairs[pairs.p_permutation < 0.05], pairs[pairs.p_permutation >= 0.05])
    )
    text = (
        f"{rank} of {int(mine.width.iloc[0])} directions of another domain hold {other.value.mean():.2f} of a domain's "
        f"gradient energy, those of its own other half {own.value.mean():.2f}, random ones {mine.chance.mean():.3g} "
        f"(mean over sites and heads); {above} of {len(other)} overlaps lie above chance (p < 0.05 each, uncorrected). "
    )
    for of, label in draw.NULLS.items():
        if of in set(nulls.of):
            text += f"Directions of {label} hold {nulls[nulls.of == of].value.mean():.2f}. "
    if differ:
        text += f"Domains differ when shards are exchanged: {', '.join(differ)}. "
    if same:
        text += f"Not told apart from one pool: {', '.join(same)}. "
    return text.strip()


def _table(energy: pd.DataFrame, exchanged: pd.DataFrame, rank: int) -> Table:
    mine = energy[(energy["rank"] == rank) & (energy.of == "domain")]
    means = mine.groupby(["a", "b"], sort=False)[["value", "full", "chance"]].mean()
    tested = {(row.a, row.b): row.p_permutation for row in exchanged[exchanged.site == "all"].itertuples()}
    rows = []
    for (a, b), row in means.iterrows():
        p = tested.get((a, b), tested.get((b, a)))
        shares = (f"{share:.3f}" for share in (row.value, row.full, row.chance))
        rows.append([a, b, *shares, "ceiling" if p is None else f"{p:.2g}"])
    head = ["subspace of", "gradients of", "energy share", "all examples", "chance", "p (one pool)"]
    title = f"energy held by {rank} of {int(mine.width.iloc[0])} directions, mean over sites and heads"
    return terminal(head, rows, title=title)
