"""The frame of analysis commands: its options, what it opens and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.table import Table

from spd_lens.analysis.common.command import Findings, analysis
from spd_lens.analysis.common.subject import Subject
from spd_lens.errors import SPDError
from spd_lens.output.console import single_command
from spd_lens.runs.run_dir import Run

Seen = list[tuple[str, int, bool]]


def called(main, *arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        single_command(main)(list(arguments))
    assert stop.value.code == 0


def test_a_function_of_a_subject_becomes_a_command(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Seen = []

    @analysis(runs="Runs of any kind.")
    def main(subject: Subject, *, n: Annotated[int, typer.Option(min=1, help="How many.")] = 3) -> Findings:
        """A question."""
        seen.append((subject.name, n, subject.progress))
        return Findings(Table(title="of a [b]table"), "says [red]so[/red]", [Path("a.csv"), Path("b.html")])

    path = finished_run.path
    called(main, str(path), "--n", "5", "--quiet")
    called(main, str(path))
    main([path], n=7, quiet=True)
    assert seen == [(path.name, 5, False), (path.name, 3, True), (path.name, 7, False)]
    out = capsys.readouterr().out
    assert out.count("says [red]so[/red]") == out.count("written: a.csv, b.html") == 3
    called(main, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert all(part in out for part in ("A question.", "Runs of any kind.", "How many.", "--no-quiet"))


def test_an_analysis_of_several_runs_is_called_once_and_refuses_one(finished_run: Run) -> None:
    seen: list[int] = []

    @analysis(together="two, please")
    def main(found: list[Subject]) -> None:
        seen.append(len(found))

    with pytest.raises(SPDError, match="two, please"):
        main([finished_run.path])
    with pytest.raises(SPDError, match="two of the run directories are called"):
        main([finished_run.path, finished_run.path])
    assert seen == []
