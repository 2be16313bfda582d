"""`spd-lens analyze estimators`: a contest of estimators at equal damage, with what was predicted of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from spd_lens.analysis.common import Findings, Quiet
from spd_lens.analysis.estimators.completions import accuracy, answers, cards, scores
from spd_lens.analysis.estimators.engine import Held
from spd_lens.analysis.estimators.findings import contest_findings
from spd_lens.analysis.estimators.page import contest_page
from spd_lens.analysis.estimators.predictions import Predictions, sha256
from spd_lens.analysis.estimators.report import report, says, shown
from spd_lens.analysis.estimators.settings import Contest, open_places
from spd_lens.analysis.estimators.tables import accuracy_differences, differences, entrants, everywhere
from spd_lens.errors import SPDError
from spd_lens.files import write_json, write_text
from spd_lens.models import ModelPair
from spd_lens.output import Console, set_up_logging
from spd_lens.subspaces import write_findings

log = logging.getLogger(__name__)


def main(
    places: Annotated[list[Path], typer.Argument(help="Run directories, or YAML files with the settings of a run.")],
    contest: Annotated[Path, typer.Option(help="YAML file with what is compared; see docs/contest.md.")],
    predictions: Annotated[
        Path | None, typer.Option(help="YAML file with what was predicted, and when; see docs/contest.md.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; analysis/contest of the run if not given.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Which estimator's directions do good: all at one KL from base, against random subspaces and the paper's.

    Nothing is trained. A contest that was killed goes on where it was. Writes contest.md, .csv, .json and .html,
    contest-entrants.csv, and findings.json in the folder of each place.
    """
    set_up_logging(quiet)
    hold(places, contest, predictions, out, progress=not quiet)


def hold(
    places: list[Path],
    contest: Path,
    predictions: Path | None = None,
    out: Path | None = None,
    *,
    pair: ModelPair | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What the command does, with a pair that may be loaded already; returns the table of differences."""
    asked = Contest.read(contest)
    known = None if predictions is None else Predictions.read(predictions)
    found, folder = open_places(places, out, pair=pair, progress=progress)
    for place in found:  # what a task cannot mark is refused before another place is measured
        for span in asked.spans:
            place.task_of(span)
    tables, reached, right, shown_texts, evidence, left_out = [], [], [], [], [], list[SPDError]()
    for place in found:
        held = Held(place, asked)
        held.measure()
        reached.append(entrants(held))
        try:
            tables.append(differences(held))
        except SPDError as error:  # the report of the other places is not lost
            log.warning("%s is left out: %s", place.name, error)
            left_out.append(error)
            continue
        evidence.append(write_findings(place.folder, contest_findings(held)))
        written = answers(held, tables[-1])
        scored = scores(held, written)
        compared = accuracy_differences(held, scored)
        tables += [] if compared.empty else [compared]
        right.append(accuracy(held, written, scored, compared))
        shown_texts += cards(held, written)
    if not tables:
        raise left_out[0]
    table, taken = pd.concat(tables, ignore_index=True), pd.concat(reached, ignore_index=True)
    judged = [] if known is None else known.judged(table)
    provenance = [f"Contest file: `{contest.name}`, sha256 `{sha256(contest)}`."]
    facts: dict[str, Any] = {"contest": asked.model_dump(mode="json"), "contest_sha256": sha256(contest)}
    if predictions is not None and known is not None:
        digest = sha256(predictions)
        provenance.append(
            f"Predictions: `{predictions.name}`, written on {known.written}, sha256 `{digest}`. A difference is the "
            "same within a prediction's margin; intervals are not corrected for the number of predictions."
        )
        facts |= {"predictions": judged, "predictions_written": str(known.written), "predictions_sha256": digest}
    across = everywhere(table)
    answered = pd.concat(right, ignore_index=True)
    text = report(asked, table, taken, answered, across, judged, provenance)
    facts |= {"says": says(table), "across": across.to_dict("records"), "accuracy": answered.to_dict("records")}
    files = [
        write_text(folder / "contest.md", text),
        write_text(folder / "contest.csv", table.to_csv(index=False)),
        write_text(folder / "contest-entrants.csv", taken.to_csv(index=False)),
        write_json(folder / "contest.json", facts),
        write_text(folder / "contest.html", contest_page(text, table, shown_texts)),
        *evidence,
    ]
    told = (
        says(table)
        + [f"Left out: {error}" for error in left_out]
        + [f"Predicted: {one['claim']} {one['outcome']} ({one['of']})." for one in judged]
    )
    *others, last = table.place.unique()
    for name in others:
        Console().print(shown(table, name))
    Findings(shown(table, last), "\n".join(told), files).show()
    return table
