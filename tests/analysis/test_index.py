"""`spd-lens analyze`: the list, unknown names, and that every entry is a module with a command."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

from spd_lens.analysis.index import ANALYSES, analyze
from spd_lens.cli.commands import app as cli_app
from spd_lens.errors import SPDError
from spd_lens.output.console import start


def test_without_arguments_it_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        analyze(arguments)
        out = capsys.readouterr().out
        for name in ANALYSES:
            assert name.replace("_", "-") in out


@pytest.mark.parametrize("name", ["spectrum", "inputs", "../spectra", "os", ""])
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(SPDError, match="choose from spectra, overlap, rank-sweep"):
        analyze([name])


@pytest.mark.parametrize("name", list(ANALYSES))
def test_every_entry_is_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(f"spd_lens.analysis.{name}") is not None  # for `python -m`
    module = importlib.import_module(ANALYSES[name].module, package="spd_lens.analysis")
    assert module.main.__doc__
    with pytest.raises(SystemExit) as stop:
        analyze([name.replace("_", "-"), "--help"])
    assert stop.value.code in (0, None)
    assert "RUN" in capsys.readouterr().out.upper()


def test_through_the_main_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        start(cli_app, ["analyze", "overlap", "only-one"], on_interrupt="")
    assert stop.value.code == 2
    assert "two runs or more" in " ".join(capsys.readouterr().err.split())


def test_a_module_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spd_lens.analysis.spectra", "no/such/run"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "is not a run directory" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
