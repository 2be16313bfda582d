"""The gains of the paper's table 1 beside those that were measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from spd_lens.analysis.common import CODE_MATH_QA, LABELS, LOSSES, SOURCE_OF, STAND_FOR, TABLES
from spd_lens.analysis.gain.completions import COMPONENTS, Opened
from spd_lens.errors import SPDError
from spd_lens.study import BACKBONES, BASE, backbone

ROWS = ("psr", "ssd", "spd")
"""The rows of the paper's table that stand beside ours."""
COLUMNS = [
    "study", "backbone", "target", "scorer", "own", "method", "paper_base", "paper_gain", "base", "gain", "low", "high",
    *COMPONENTS,
]  # fmt: skip


def asked(name: str | None, studies: Sequence[Opened]) -> str | None:
    """The paper's backbone to print beside: the one asked for, or else the studies' own model if it is one.

    Raises:
        SPDError: the paper has no such model.
    """
    if name is None:
        return backbone(studies[0].model)
    if (found := backbone(name)) is None:
        raise SPDError(f"the paper has no model {name!r}; choose from {', '.join(BACKBONES)}")
    return found


def beside_paper(table: pd.DataFrame, model: str) -> pd.DataFrame:
    """Gains over the base model in points, as printed and as measured under each scorer.

    Columns are from the source of their own domain, as in the paper. CodeAlpaca is left out: there the paper prints a
    loss. The paper gives no intervals.

    Args:
        table: From `split`.
        model: One of the paper's backbones.

    Returns:
        Columns `COLUMNS`, a row for every study, target, scorer and method that both have; `base` and gains are in
        points.
    """
    printed = {row.method: dict(zip(CODE_MATH_QA, row.values, strict=True)) for row in TABLES[1].rows
               if row.backbone == model}  # fmt: skip
    rows: list[dict[str, Any]] = []
    known = table.set_index(["study", "source", "target", "scorer", "method", "quantity"]).sort_index()
    places = itertools.product(table.study.unique(), CODE_MATH_QA, table.scorer.unique(), ROWS)
    for study, target, scorer, method in places:
        place = study, SOURCE_OF[target], target, scorer
        name = next((name for name in STAND_FOR.get(method, (method,)) if (*place, name, "score") in known.index), None)
        if name is None or target in LOSSES:
            continue
        found, base = known.loc[(*place, name, "score")], known.loc[(*place, BASE, "score")]
        rows.append(
            {
                "study": study, "backbone": model, "target": LABELS[target], "scorer": scorer, "own": found.own,
                "method": name, "paper_base": printed[BASE][target],
                "paper_gain": printed[method][target] - printed[BASE][target], "base": 100 * base.value,
                "gain": 100 * found.gain, "low": 100 * found.gain_low, "high": 100 * found.gain_high,
                **{part: 100 * known.loc[(*place, name, part)].gain for part in COMPONENTS},
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
