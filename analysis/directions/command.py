"""What a singular direction means: the tokens a value direction writes, the queries a key direction answers, and the
calibration tokens that pull on it.

A singular vector has no sign, so both poles are read. A value direction is turned so that moving along `+` lowers the
loss on average over the calibration tokens (`Σ g·d < 0`). For keys that sum says nothing: softmax does not see a shift
that all keys share, so their gradients add up to about zero (exactly without RoPE); `+` is where the head's queries
point on average. Beside every number stands the same number for random
directions of that head: an unembedding makes some tokens of any direction, and some random directions look peaked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import torch
import typer
from rich.table import Table

from spd_lens.analysis.common import (
    Estimated,
    Findings,
    Subject,
    analysis,
    beside_null,
    figure,
    line,
    pieces_of,
    place,
    spelled,
    tokens_of,
)
from spd_lens.analysis.directions.page import COMMON, cards_page
from spd_lens.analysis.directions.readout import Directions, Unembedding
from spd_lens.analysis.directions.sums import Tally, Vocabulary
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.files import write_text
from spd_lens.models import Loss, ModelPair, neutrally
from spd_lens.output import terminal
from spd_lens.sites import resolve_layers
from spd_lens.subspaces import GradientMoments, Subspace, token_gradients

MEASURES: dict[str, str] = {
    "energy share": "share of the head's gradient energy",
    "one-sidedness": "|Σ g·d| / Σ |g·d|: 1 where all tokens pull the same way",
    "first-token share": "share of the direction's energy at position 0, the attention sink",
    "effective examples": "(Σ e)² / Σ e² over the examples' energies e: how many of them carry the direction",
    "vocabulary kurtosis": "excess kurtosis of the logits that it writes, mean over query heads: 0 for a Gaussian",
    "query energy": "mean squared cosine with the head's queries, times d_head: 1 where queries point anywhere",
}


@neutrally
def read_directions(
    pair: ModelPair,
    examples: Sequence[Example],
    moments: GradientMoments,
    *,
    n: int = 4,
    top: int = 8,
    n_random: int = 100,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    estimated: Estimated | None = None,
    loss: Loss = "aligned",
    engine: str = "lens",
    max_calibration_tokens: int | None = None,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the leading `n` directions of every head, of keys and of values.

    Args:
        pair: The model that the moments were taken from.
        examples: The calibration examples of the moments, whose tokens pull and query.
        moments: The moments.
        n: Number of directions per head.
        top: Number of tokens per pole and query head, and of contexts per direction.
        n_random: Number of random directions per head, the null.
        seed: Seed of the random directions.
        layers: Layers whose directions are read; None for all that the moments have.
        estimated: Where the directions come from; None: the moments (Eq. 9-11).
        loss: The loss that was differentiated.
        engine: The model that is run.
        max_calibration_tokens: Tokens behind which a text is cut. It, loss and engine are those of `extract`.
        progress: Whether to show a bar.

    Returns:
        measures: one row per direction (counted from 1) and measure of `MEASURES`: `value`, the random directions'
            mean `null` and their central 95 % `null_low, null_high`, and `p`, the share of random directions with at
            least this value (never below `1 / (1 + n_random)`). `sign` turns `moments.subspace(n).bases` this way.
        tokens: one row per direction, `role`, `pole` and `place` (from 1). Role `vocabulary`: `token` that the pole
            promotes through `query_head`, `value` its logit in standard deviations over the vocabulary, `null` how
            many of the random directions' poles have it among their first `top`. Role `query`: a token whose query
            (of `query_head`) points along the pole, `value` the cosine, above 0. Role `pull`: a token whose gradient
            asks for the pole, `value` `|g·d|` in nats per unit. Of each example, at most one token per role and pole,
            and never its first, whose attention-sink gradients would fill every list (see `first-token share`).

    Raises:
        SPDError: sites of other kinds, or an architecture that the read-out does not know.
    """
    sites = [s for s in moments.sites if s.kind in ("k", "v") and (layers is None or s.layer in layers)]
    if not sites:
        raise SPDError("only directions of keys and values can be read, and the moments have neither")
    moments.fingerprint.check(pair.fingerprint, "the moments")
    subspace = (estimated or moments.subspace)(n, per_head=True, sites=sites)
    unembed = Unembedding.of(pair.hf) if any(site.kind == "v" for site in sites) else None
    tallies = [Tally(site, subspace.bases[site]) for site in sites]
    drawn = (random_directions(tally.directions, n_random, seed + i) for i, tally in enumerate(tallies))
    nulls = [Tally(site, random, keep=False) for site, random in zip(sites, drawn, strict=True)]
    taken: dict[str, Any] = {"loss": loss, "engine": engine, "max_calibration_tokens": max_calibration_tokens}
    _fill([*tallies, *nulls], pair, examples, progress=progress, **taken)
    texts = [[spelled(piece) for piece in tokens_of(pieces)] for pieces in pieces_of(examples, pair.format, loss)]
    measures, tokens = list[dict[str, Any]](), list[dict[str, Any]]()
    for tally, null in zip(tallies, nulls, strict=True):
        read = Vocabulary(pair, unembed, tally.site, top) if unembed is not None and tally.site.kind == "v" else None
        rows, words = _of_site(tally, null, read, subspace, texts, top)
        measures, tokens = measures + rows, tokens + words
    return pd.DataFrame(measures), pd.DataFrame(tokens)


def _of_site(
    tally: Tally, null: Tally, read: Vocabulary | None, subspace: Subspace, texts: Sequence[Sequence[str]], top: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `measures` and of `tokens` of one site; `read` looks at the vocabulary, of values alone."""
    measures, tokens = list[dict[str, Any]](), list[dict[str, Any]]()
    values, chance, signs = tally.measures(), null.measures(), tally.signs
    ranks, known = subspace.ranks[tally.site], subspace.singular_values.get(tally.site)
    if read is not None:
        values["vocabulary kurtosis"], found = read(tally.directions * signs[:, None])
        chance["vocabulary kurtosis"], random = read(null.directions)
        tokens += read.rows(found, random, ranks)
    for head, i in ((head, i) for head, rank in enumerate(ranks) for i in range(rank)):
        where = {**place(tally.site, head, per_head=True), "direction": i + 1}
        sigma, sign = float("nan") if known is None else known[head, i].item(), signs[head, i].item()
        for name, value in values.items():
            row = {**where, "singular_value": sigma, "sign": sign, "measure": name}
            measures.append({**row, **beside_null(value[head, i].item(), chance[name][head])})
        tokens += [{**where, **row} for row in tally.contexts(head, i, sign, texts, top)]
    return measures, tokens


def _fill(tallies: Sequence[Tally], pair: ModelPair, examples: Sequence[Example], **options: Any) -> None:
    """Add all tokens of the examples to the tallies, in one pass; `options` are those of `token_gradients`."""
    kinds = sorted({tally.site.kind for tally in tallies})
    layers = sorted({tally.site.layer for tally in tallies})
    kinds += ["q"] if "k" in kinds else []  # keys are compared with the queries of their layer
    for rows in token_gradients(pair, examples, layers=layers, kinds=kinds, **options):
        for tally in tallies:
            tally.add(pair.hf, rows)


def random_directions(like: Directions, n: int, seed: int) -> Directions:
    """`n` unit vectors for each head, each uniformly random and independent of the others."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape[0], like.shape[1], n, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def measure_figure(measures: pd.DataFrame, measure: str) -> go.Figure:
    """Each direction's value over the central 95 % of random directions of its head, in grey."""
    part = measures[measures["measure"] == measure]
    if not len(part):
        raise SPDError(f"there is no measure {measure!r} here; choose from {', '.join(measures['measure'].unique())}")
    beyond = int((part["value"] > part["null_high"]).sum())
    count = f"{beyond} of {len(part)} lie above the central 95 % of random directions; 2.5 % would by chance"
    fig = figure(
        f"{measure[0].upper()}{measure[1:]} of the leading directions", "site · head · direction", measure,
        says=f"{MEASURES[measure]}<br>{count}",
    )  # fmt: skip
    names = part["site"] + " · " + part["head"] + " · " + part["direction"].astype(str)
    middle = (part["null_low"] + part["null_high"]) / 2
    reach = (part["null_high"] - part["null_low"]) / 2
    line(
        fig, names, middle, "random directions, central 95 % (null)", null=True, symbol="line-ew-open", size=9,
        mode="markers", error_y={"array": reach, "thickness": 5, "width": 0}, hoverinfo="skip",
    )  # fmt: skip
    for i, (site, rows) in enumerate(part.groupby("site", sort=False)):
        hover = [f"{v:.3g}, random mean {m:.3g}, p = {p:.2g}" for v, m, p in rows[["value", "null", "p"]].to_numpy()]
        line(
            fig, names[rows.index], rows["value"], f"site {site}", index=i, size=9, mode="markers", text=hover,
            hovertemplate="%{x}: %{text}<extra></extra>",
        )  # fmt: skip
    fig.update_layout(legend={"y": 1.0, "yanchor": "bottom"}, margin_t=150, height=500)
    fig.update_xaxes(tickangle=-90, tickfont_size=11)
    if measure == "effective examples":
        fig.update_yaxes(rangemode="tozero")
    return fig


def say(measures: pd.DataFrame) -> str:
    """What the numbers show against random directions, in sentences."""
    by = {str(measure): rows for measure, rows in measures.groupby("measure")}
    first = by["energy share"][by["energy share"]["direction"] == 1]
    sink, carried = by["first-token share"], by["effective examples"]
    sentences = [
        f"The first direction of a head holds {first['value'].median():.0%} of its gradient energy (median over "
        f"{len(first)} heads; a random one {first['null'].median():.1%}; it is chosen to hold the most).",
        f"{sink['value'].median():.0%} of a direction's energy is at the first token (median; random directions: "
        f"{sink['null'].median():.0%}).",
        f"Directions are carried by {carried['value'].median():.1f} examples (median, effective number), random ones "
        f"by {carried['null'].median():.1f}.",
    ]
    for measure, claim in (
        ("vocabulary kurtosis", "value directions write a more peaked vocabulary than"),
        ("query energy", "key directions match queries better than"),
    ):
        if measure in by:
            beyond, expected = int((by[measure]["value"] > by[measure]["null_high"]).sum()), 0.025 * len(by[measure])
            much = "" if beyond > 3 * expected + 1 else ", which is near what chance gives"
            sentences.append(
                f"{beyond} of {len(by[measure])} {claim} 97.5 % of random directions of their head (by chance: "
                f"{expected:.1f}){much}."
            )
    return " ".join(sentences)


@analysis()
def main(
    subject: Subject,
    *,
    n: Annotated[int, typer.Option(min=1, help="Directions per head.")] = 4,
    top: Annotated[int, typer.Option(min=1, help="Tokens per pole, and contexts per direction.")] = 8,
    n_random: Annotated[int, typer.Option(min=19, help="Random directions per head, the null.")] = 100,
    layers: Annotated[str, typer.Option(help="Block indices such as 9,14; the run's own layers if empty.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the random directions.")] = 0,
) -> Findings:
    """What the leading singular directions read and write, in tokens; a table and a page of cards."""
    config, examples, pair = subject.run.config, subject.calibration(), subject.pair
    estimated, chosen = subject.estimated(), resolve_layers(layers, pair.n_layers) if layers else None
    if chosen and not {site.layer for site in estimated.moments.sites} >= set(chosen):
        estimated = subject.estimated(layers="all")
    measures, tokens = read_directions(
        pair, examples, estimated.moments, estimated=estimated, n=n, top=top, n_random=n_random, seed=seed,
        layers=chosen, loss=config.loss, engine=config.engine, max_calibration_tokens=config.max_calibration_tokens,
        progress=subject.progress,
    )  # fmt: skip
    says = say(measures)
    facts: dict[str, Any] = {"examples": len(examples), "n_random": n_random, "seed": seed, "loss": config.loss}
    subject.save("directions-tokens", tokens, **facts)
    shown = [m for m in ("vocabulary kurtosis", "query energy", "first-token share", "effective examples")
             if m in set(measures["measure"])]  # fmt: skip
    figures = [measure_figure(measures, measure) for measure in shown]
    paths = subject.save("directions", measures, figures, says=says, **facts)
    pieces = pieces_of(examples, pair.format, config.loss)
    page = cards_page(subject.name, measures, tokens, examples, pieces, says=says, model=config.model)
    paths.append(write_text(subject.folder / "directions-cards.html", page))
    return Findings(_table(subject.name, measures, tokens), says, paths)


def _table(name: str, measures: pd.DataFrame, tokens: pd.DataFrame) -> Table:
    table = []
    leading = measures[(measures["direction"] == 1) & (measures["measure"] == "energy share")]
    for row in leading.itertuples():
        mine = tokens[(tokens["site"] == row.site) & (tokens["head"] == row.head) & (tokens["direction"] == 1)]

        def listed(rows: pd.DataFrame) -> str:
            return " ".join(repr(str(t)) for t in dict.fromkeys(rows["token"][:6])).replace("[", "\\[")

        role = "vocabulary" if row.kind == "v" else "query"
        read = mine[(mine["role"] == role) & (mine["pole"] == "+") & (mine["null"] < COMMON)].sort_values("place")
        pulls = mine[mine["role"] == "pull"]
        table.append([row.site, row.head, str(row.direction), f"{row.value:.2f}", listed(read), listed(pulls)])
    columns = ["site", "head", "direction", "energy share", "reads out (+ pole)", "pulled by"]
    return terminal(columns, table, title=f"directions · {name}")
