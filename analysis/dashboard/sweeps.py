"""Saved rank and layer sweeps, as the page draws them, from the tables that the analyses wrote."""

from __future__ import annotations

from typing import Any

import pandas as pd

from spd_lens.analysis.common import LOSS_FIELDS, Subject, deciding
from spd_lens.errors import SPDError
from spd_lens.evaluation import OUTCOMES
from spd_lens.output import visible

_NUMBERS = {"rank", "width", "value", "low", "high", "random", "random_low", "random_high", "difference", "p_holm"}
_NEEDED = {
    "layers", "kind", "head", "projector", "rank", "width", "measure", "value", "low", "high", "random", "random_low",
    "random_high",
}  # fmt: skip
_FIELDS = (*LOSS_FIELDS, "kl")
SURE = 0.05
"""Cells whose difference from random has a Holm-corrected p below this are marked."""


def rank_sweep(subject: Subject) -> list[dict[str, Any]]:
    """One curve per choice of layers, kinds, heads and projector that was swept over two ranks or more.

    A row has, for every outcome that was measured, `[change from base, low, high]` (95 % over items) and the same for
    random subspaces of its ranks: `[mean, smallest, largest]` over draws. The run's own choice comes first.
    """
    frame = _table(subject, "rank_sweep")
    if frame is None:
        return []
    families = []
    fields = [field for field in _FIELDS if field in set(frame["measure"])]
    reason = subject.facts("rank_sweep").get("reason", "")
    for key, cells in frame.groupby(["layers", "kind", "head", "projector"], sort=False):
        layers, kind, head, projector = map(str, key)
        rows = [_row(int(rank), of_rank) for rank, of_rank in cells.groupby("rank")]
        if len(rows) < 2:
            continue
        name = f"{layers.replace('_', ' ')}, {kind.upper()}"
        name += "" if head == "all" else f", head {head}"
        name += "" if projector == "per_head" else ", joint"
        families.append(
            {
                "name": visible(name),
                "per_head": projector == "per_head",
                "width": int(cells["width"].iloc[0]),
                "own": _is_own(subject, layers, kind, head, projector),
                "rows": rows,
                "fields": fields,
                "decides": deciding(fields),
                "says": visible(str(reason)),
            }
        )
    return sorted(families, key=lambda family: not family["own"])


def layer_sweep(subject: Subject) -> dict[str, Any] | None:
    """The loss that decides for every choice of layers, minus that of random subspaces: a row per choice, a column per
    kind and rank; None where no layer sweep was saved."""
    frame = _table(subject, "layer_sweep")
    if frame is None or "difference" not in frame:
        return None
    by = deciding(set(frame["measure"]))
    frame = frame[(frame["measure"] == by) & (frame["head"].astype(str) == "all")]
    frame = frame[frame["projector"] == frame["projector"].mode().iloc[0]] if len(frame) else frame
    if frame.empty:
        return None
    frame = frame.assign(column=[f"{k.upper()}, rank {r}" for k, r in zip(frame["kind"], frame["rank"], strict=True)])
    rows, columns = list(dict.fromkeys(frame["layers"])), list(dict.fromkeys(frame["column"]))
    cells = {(row.layers, row.column): row for row in frame.itertuples()}
    found = [[cells.get((row, column)) for column in columns] for row in rows]
    sure = [cell for line in found for cell in line if cell is not None and getattr(cell, "p_holm", 1) < SURE]
    return {
        "rows": [visible(str(row)).replace("_", " ") for row in rows],
        "columns": columns,
        "z": [[None if cell is None else _number(cell.difference) for cell in line] for line in found],
        "text": [[_text(cell) for cell in line] for line in found],
        "x": "kinds and rank",
        "y": "layers projected",
        "unit": "nats per token",
        "says": f"{OUTCOMES[by].capitalize()} under the projection minus that under random subspaces of its ranks: "
        f"below 0, the gradients' directions do better. {len(sure)} of {len(frame)} cells differ from random "
        f"(* Holm-corrected p < {SURE}).",
    }


def _table(subject: Subject, name: str) -> pd.DataFrame | None:
    """A saved table; None if there is none, or one of another form."""
    frame = subject.saved(name)
    if frame is None or not set(frame.columns) >= _NEEDED or not len(frame):
        return None
    for column in _NUMBERS & set(frame.columns):
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise SPDError(f"the column {column!r} of {name}.csv in {subject.folder} is not of numbers; analyze again")
    return frame


def _row(rank: int, cells: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {"rank": rank, "random": {}}
    for cell in cells.itertuples():
        if (key := str(cell.measure)) in _FIELDS:
            row[key] = [_number(cell.value), _number(cell.low), _number(cell.high)]
            row["random"][key] = [_number(cell.random), _number(cell.random_low), _number(cell.random_high)]
    return row


def _is_own(subject: Subject, layers: str, kind: str, head: str, projector: str) -> bool:
    config = subject.run.config
    mine = config.layers if isinstance(config.layers, str) else ",".join(map(str, config.layers))
    shape = "per_head" if config.per_head else "joint"
    same_kinds = kind == "".join(config.kinds) or set(kind.split("+")) == set(config.kinds)
    return layers == mine and same_kinds and head == "all" and projector == shape


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _text(cell: Any) -> str:
    if cell is None or pd.isna(cell.difference):
        return ""
    return f"{cell.difference:+.2f}".replace("-", "−") + ("*" if getattr(cell, "p_holm", 1) < SURE else "")
