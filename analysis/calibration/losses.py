"""What projections by several subspaces do to held-out items: every loss and KL, with intervals over items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import LOSS_FIELDS, NULL_COLOR, bars, by_item, figure, known, line
from spd_lens.evaluation import OUTCOMES, teacher_forced
from spd_lens.examples import Example
from spd_lens.models import ModelPair, neutrally
from spd_lens.stats import mean_interval, paired_difference
from spd_lens.subspaces import Policy, Subspace


@neutrally
def losses_under(
    pair: ModelPair,
    subspaces: Mapping[str, Sequence[Subspace]],
    items: Sequence[Example],
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """Losses and KL under projection, teacher-forced on held-out items.

    Args:
        pair: The model.
        subspaces: Subspaces by label; several of one label are averaged per item, since items are the sample.
        items: Held-out examples with completion and spans.
        progress: Show a progress bar.

    Returns:
        Columns `label, measure, value, low, high, n`: `"change of aligned loss"` from base, and of every other loss of
        `OUTCOMES` that the items have, in nats per token of that kind, paired per item; `"KL from base"` in nats per
        token. Intervals are 95 % bootstrap intervals over the `n` items that have the measure.
    """
    policies = [Policy("base")]
    policies += [Policy(f"{label}#{i}", one) for label, several in subspaces.items() for i, one in enumerate(several)]
    found = teacher_forced(pair, items, policies, progress=progress)
    values = {policy: by_item(measured, (*LOSS_FIELDS, "kl")) for policy, measured in found.items()}
    rows = []
    for label, several in subspaces.items():
        for field, base in values["base"].items():
            mean = np.mean([values[f"{label}#{i}"][field] for i in range(len(several))], axis=0)
            estimate = mean_interval(mean) if field == "kl" else paired_difference(known(base, base), known(mean, base))
            measure = OUTCOMES[field] if field == "kl" else f"change of {OUTCOMES[field]}"
            rows.append({"label": label, "measure": measure, **estimate.to_row()})
    return pd.DataFrame(rows)


def losses_figure(table: pd.DataFrame, measure: str, *, title: str) -> go.Figure:
    """Values of `losses_under` as points with intervals; labels that begin with `random` are grey."""
    part = table[table.measure == measure]
    fig = figure(
        title, "subspace from", f"{measure}<br>(nats per token)", says="bars: 95 % interval over held-out items"
    )
    for grey in (False, True):
        mine = part[part.label.str.startswith("random") == grey]
        if mine.empty:
            continue
        name = "random subspaces" if grey else "subspace"
        line(
            fig, mine.label, mine.value, name, null=grey, mode="markers", error_y=bars(mine.value, mine.low, mine.high)
        )
    if measure != "KL from base":
        fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1})
    fig.update_xaxes(categoryorder="array", categoryarray=list(dict.fromkeys(table.label)))
    return fig
