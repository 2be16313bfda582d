"""Figure 4 of the paper: accuracy after SPD against the number of calibration examples, from studies or runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import FIGURE_4, FIGURE_4_SIZES, LABELS, NULL_COLOR, band, bars, figure, line, plain
from spd_lens.errors import SPDError
from spd_lens.files import read_csv
from spd_lens.runs import SPDConfig
from spd_lens.stats import clustered_mean
from spd_lens.study import BASE, Evidence, Outcome

LOSSES_FILE = Path("analysis") / "calibration_size-losses.csv"
COLUMNS = ["folder", "source", "target", "method", "measure", "n_calibration", "value", "low", "high", "n", "seeds"]
CHANGE = "change of "
METHODS = ("spd", "spd-random", BASE)


def points(folders: Sequence[str | Path]) -> pd.DataFrame:
    """What folders know about calibration size.

    Studies give accuracy in percent after training (of `spd`, `spd-random` and the base) at their own `n_calibration`;
    run directories with `analyze calibration-size` give the change of every loss under the projection.

    Returns:
        Columns `folder, source, target, method, measure, n_calibration, value, low, high, n, seeds`.

    Raises:
        SPDError: A folder that is neither.
    """
    rows: list[dict[str, Any]] = []
    for folder in map(Path, folders):
        if (folder / "results.csv").is_file():
            rows += _of_study(Evidence.read(folder))
        elif (folder / LOSSES_FILE).is_file():
            rows += _of_run(folder)
        else:
            raise SPDError(
                f"{folder} is neither a study with results nor a run with {LOSSES_FILE}; run `spd-lens study`, or "
                "`spd-lens analyze calibration-size` on the run"
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def _of_study(study: Evidence) -> list[dict[str, Any]]:
    settings = study.plan.get("settings") or {}
    by_source = study.plan.get("source_settings") or {}
    default = SPDConfig.model_fields["n_calibration"].default
    rows: list[dict[str, Any]] = []
    for source in study.sources:
        size = by_source.get(source, {}).get("n_calibration", settings.get("n_calibration", default))
        for target in study.targets:
            for method in METHODS:
                found = mean_score(study, Outcome(source, target, "target", "trained", method, "accuracy"))
                if found is not None:
                    rows.append(
                        {
                            "folder": study.name, "source": source, "target": target, "method": method,
                            "measure": "accuracy", "n_calibration": int(size), **found,
                        }
                    )  # fmt: skip
    return rows


def mean_score(study: Evidence, outcome: Outcome) -> dict[str, Any] | None:
    """Columns `value, low, high, n, seeds` of what a study measured; accuracies in percent. None if it has none."""
    scores = study.scores(outcome)
    if scores is None or not scores.size:
        return None
    found = clustered_mean(scores.to_numpy())
    factor = 100.0 if outcome.measure == "accuracy" else 1.0
    low, high = (factor * end if found.bounded else None for end in (found.low, found.high))
    return {"value": factor * found.value, "low": low, "high": high, "n": found.n, "seeds": len(scores)}


def _of_run(folder: Path) -> list[dict[str, Any]]:
    table = read_csv(folder / LOSSES_FILE)
    table = table[table.measure.str.startswith(CHANGE)]
    name = folder.resolve().name
    sizes = [int(label.split()[0]) for label in table.label if not label.startswith("random")]
    rows: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        null = row["label"].startswith("random")  # random directions are of no number of examples
        for size in sizes if null else [int(row["label"].split()[0])]:
            rows.append(
                {
                    "folder": name, "source": name, "target": name, "measure": row["measure"],
                    "method": "spd-random" if null else "spd", "n_calibration": size, "value": row["value"],
                    "low": row["low"], "high": row["high"], "n": row["n"], "seeds": 1,
                }
            )  # fmt: skip
    return rows


def figure_4(frame: pd.DataFrame) -> list[go.Figure]:
    """A figure for each measure and target: value against calibration size, controls grey, the paper's range a band."""
    figures = []
    for (measure, target), part in frame.groupby(["measure", "target"], sort=False):
        accuracy = measure == "accuracy"
        label = LABELS.get(str(target), plain(str(target)))
        what = "accuracy after SPD" if accuracy else f"{str(measure).removeprefix(CHANGE)} under the projection"
        fig = figure(
            f"{label}: {what}",
            "calibration examples", "accuracy (%)" if accuracy else "change from base (nats)",
            says="bars: 95 % interval over items" + ("; band: the paper's printed range" if target in FIGURE_4 else ""),
        )  # fmt: skip
        if accuracy and target in FIGURE_4:
            low, high = FIGURE_4[str(target)]
            band(fig, list(FIGURE_4_SIZES), [low, low], [high, high], index=4)
        for index, (source, method) in enumerate(itertools.product(part.source.unique(), METHODS)):
            own = part[(part.source == source) & (part.method == method)].sort_values("n_calibration")
            if own.empty:
                continue
            name = plain(f"{method}, source {source}")
            line(
                fig, own.n_calibration, own.value, name, index=index, null=method != "spd",
                symbol="diamond-open" if method == BASE else "", error_y=bars(own.value, own.low, own.high),
            )  # fmt: skip
        if not accuracy:
            fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"})
        ticks = sorted({20, 50, 100, 200, 500, *map(int, part.n_calibration)})
        fig.update_xaxes(type="log", tickvals=ticks, range=[math.log10(ticks[0] / 1.2), math.log10(ticks[-1] * 1.2)])
        fig.update_layout(legend={"y": -0.32})
        figures.append(fig)
    return figures


def points_sentence(frame: pd.DataFrame) -> str:
    """What there is, and whether it shows that the number of examples matters."""
    sentences = []
    for (measure, target), part in frame[frame.method == "spd"].groupby(["measure", "target"], sort=False):
        sizes = sorted(part.n_calibration.unique())
        if len(sizes) < 2:
            sentences.append(f"{measure} on {target}: one size ({sizes[0]}), so nothing about size.")
            continue
        overlap = part.low.max() <= part.high.min()
        values = ", ".join(
            f"{row.value:.3g} at {row.n_calibration}" for row in part.sort_values("n_calibration").itertuples()
        )
        verdict = "all intervals overlap: within noise" if overlap else "not all intervals overlap"
        sentences.append(f"{measure} on {target}: {values}; {verdict}.")
    return " ".join(sentences) or "No result after SPD yet: not run."
