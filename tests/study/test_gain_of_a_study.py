"""The gain of a study that was really run: its completions are read where the study keeps them."""

from __future__ import annotations

import pandas as pd
import pytest

from spd_lens.analysis.gain.command import main
from spd_lens.analysis.gain.completions import COMPONENTS, open_all
from spd_lens.analysis.gain.factorial import grid, prompt_format
from spd_lens.errors import SPDError
from spd_lens.study.folder import Study
from spd_lens.study.results import results_frame


def test_a_studys_change_is_split(copied_study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in copied_study.path.rglob("*") if path.is_file()}
    main([copied_study.path], quiet=True)
    assert {path: path.read_bytes() for path in before} == before
    table = pd.read_csv(copied_study.path / "gain" / "gain.csv")
    assert set(table.target) == {"synthetic-math", "synthetic-qa"} and set(table.method) == {"base", "psr", "spd"}
    own = table[table.own]
    # the same scores, ends and lengths as the study's own table has
    results = results_frame(copied_study.path)
    measured = results[results.phase.isin(["", "trained"])].groupby(["target", "method", "measure"]).value.mean()
    names = {"accuracy": "score", "finished": "ends by itself", "tokens": "tokens", "format": "asked form"}
    values = own.set_index(["target", "method", "quantity"]).value
    for (target, method, measure), value in measured.items():
        if measure in names:
            assert values[target, method, names[measure]] == pytest.approx(value)
    gains = table[table.method != "base"].pivot(
        index=["target", "scorer", "method"], columns="quantity", values="gain"
    )  # fmt: skip
    pd.testing.assert_series_equal(gains[list(COMPONENTS)].sum(axis=1), gains["score"], check_names=False)
    assert set(table[table.method != "base"].n_seeds) == {2}


def test_the_factors_of_a_study_that_was_run(copied_study: Study) -> None:
    [one] = open_all([copied_study.path], None, False)
    points = grid([one])
    assert points.set_index("method").projection.to_dict() == {"psr": "none", "spd": "spd"}
    assert prompt_format(one) == one.study.notes["resolved"]["format"]


def test_a_damaged_result_counts_as_missing(copied_study: Study) -> None:
    (copied_study.path / "base" / "eval" / "synthetic-qa.json").write_text("{", encoding="utf-8")
    with pytest.raises(SPDError, match="is not finished: base has no scored completions of synthetic-qa"):
        open_all([copied_study.path], None, False)
