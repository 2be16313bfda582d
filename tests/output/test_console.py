"""Standard streams that are closed, full, cut off or of few characters: the work is done, and a sentence says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
import typer
from rich.console import Console
from tqdm import tqdm
from spd_lens.output.console import single_command, start
from spd_lens.errors import SPDError

def work(out: Path, fail: bool = False, many: int = 1):
    for number in tqdm(range(many)):
        text = "\\u27e61\\u27e7 \\u2502 gr\\u00f6\\u00dfer \\u65e5 \\U0001f600 \\ud800"
        Console().print(f"line {number} {text}", highlight=False)
    out.write_text("made")
    sys.stdout.write("the end\\n")
    if fail:
        raise SPDError("no \\x1b]0;x\\x07 gr\\u00f6\\u00dfer")

def outer(out: Path, fail: bool = False, many: int = 1):
    start(single_command(work), [str(out), "--many", str(many), *(["--fail"] if fail else [])], on_interrupt="")

start(single_command(outer), on_interrupt="nothing was written")
"""


@pytest.fixture
def shell(tmp_path):
    """Run the program above with some redirection: exit code, stdout, stderr; its work must have been done."""

    def run(redirection: str, *arguments: str, encoding: str = "utf-8") -> tuple[int, str, str]:
        made = tmp_path / "made"
        made.unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": encoding}
        script = f'set -o pipefail; "$@" {redirection}'
        command = ["bash", "-c", script, "bash", sys.executable, "-c", PROGRAM, str(made), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=250)
        assert made.read_text() == "made"
        out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
        assert "Traceback" not in err and "Exception" not in err
        return done.returncode, out, err

    return run


@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "it is closed"), ("| head -1", "Broken pipe")],
)
def test_output_that_cannot_be_delivered_is_said_after_the_work(shell, redirection, reason):
    # more lines than a pipe holds
    code, out, err = shell(redirection, "--many", "3000")
    assert code == 1
    assert err.rstrip().endswith(
        f"error: the output could not be shown ({reason}); what the command wrote to files is there"
    )
    assert len(out.splitlines()) == (redirection == "| head -1")


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "<&-", "2>&- <&-"])
def test_other_streams_stop_nothing(shell, redirection):
    code, out, _ = shell(redirection)
    assert (code, out.splitlines()[1:]) == (0, ["the end"])


def test_a_mistake_keeps_its_exit_code_and_moves_no_cursor(shell):
    code, _, err = shell(">/dev/full", "--fail")
    assert code == 2
    assert "no \\u001b]0;x\\u0007 größer" in err and "\x1b]" not in err


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("utf-8", "line 0 ⟦1⟧ │ größer 日 😀 ?"),
        ("ascii", "line 0 [1] | gr??er ? ? ?"),
        ("cp1252", "line 0 [1] | größer ? ? ?"),
        ("latin-1", "line 0 [1] | größer ? ? ?"),
    ],
)
def test_characters_that_a_stream_lacks_are_replaced_by_the_nearest(shell, encoding, line):
    code, out, _ = shell("", encoding=encoding)
    assert (code, out.splitlines()) == (0, [line, "the end"])
