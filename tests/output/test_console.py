"""Standard streams that are closed, full, cut off or of few characters: the work is done, and a sentence says so."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import rich.console
from markdown_it import MarkdownIt
from rich.logging import RichHandler
from rich.markdown import Markdown
from rich.text import Text

from spd_lens.output.console import Console, _Patient
from spd_lens.output.safe_text import inert, visible
from spd_lens.output.tables import terminal

EVIL = "a\x1b]0;x\x07b\x1b[2Jc\x9b31md\u202ee\u200bf\x1b[8mg"
SPELLED = "a\\u001b]0;x{bell}b\\u001b[2Jc\\u009b31md\\u202ee\\u200bf\\u001b[8mg"
"""A window's title, a cleared screen, colours by one character, a line backwards, nothing, hidden text."""

PROGRAM = """
import sys
from pathlib import Path
import typer
from spd_lens.output.console import Console
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
        ("utf-8", "line 0 ⟦1⟧ │ größer 日 😀 \\ud800"),
        ("ascii", "line 0 [1] | gr??er ? ? \\ud800"),
        ("cp1252", "line 0 [1] | größer ? ? \\ud800"),
        ("latin-1", "line 0 [1] | größer ? ? \\ud800"),
    ],
)
def test_characters_that_a_stream_lacks_are_replaced_by_the_nearest(shell, encoding, line):
    code, out, _ = shell("", encoding=encoding)
    assert (code, out.splitlines()) == (0, [line, "the end"])


BEGINNING = "a\\u001b]0;x"


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (Text(EVIL), SPELLED.format(bell="")),  # rich leaves the bell out by itself
        (EVIL, SPELLED.format(bell="")),
        (f"[red]{EVIL}[/red]", SPELLED.format(bell="")),
        (Markdown(f"# {EVIL}", hyperlinks=False), SPELLED.format(bell="")),
        (terminal([EVIL], [["cell"]], title="t"), BEGINNING),
        (terminal(["head"], [[EVIL]]), BEGINNING),
        (terminal(["head"], [[Text(EVIL)]]), BEGINNING),
    ],
    ids=["text", "str", "markup", "markdown", "head", "cell", "text in a cell"],
)
def test_what_is_shown_moves_no_cursor_and_hides_nothing(shown, words):
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=120, highlight=False).print(shown)
    said = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())  # the library's own colours
    assert words in said and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)


@pytest.mark.parametrize(
    "hidden",
    "\xad\u034f\u115f\u1160\u3164\uffa0\u180b\u180e\ufe00\ufe0d\U000e0100\U000e01ef\U0001d173\u200b\u2060\ufeff",
)
def test_what_cannot_be_seen_is_spelled_out(hidden):
    assert visible(f"a{hidden}b") == f"a\\u{ord(hidden):04x}b"


def test_emoji_and_scripts_keep_what_they_need():
    assert visible("\u2764\ufe0f \u0645\u06cc\u200c\u062e") == "\u2764\ufe0f \u0645\u06cc\u200c\u062e"
    assert visible("\u2764\ufe0f\ufe0e\ufe0f") == "\u2764\ufe0f\\ufe0e\\ufe0f"  # a text in selectors


@pytest.mark.parametrize("text", ["![a](http://x)", "[b](http://x)", "[![c](http://x)](http://y)"])
def test_texts_in_a_table_are_no_links_and_pictures(text):
    shown = MarkdownIt("commonmark").enable("table").render(f"| {inert(text)} |\n| --- |\n| {inert(text)} |\n")
    assert "<img" not in shown and ">a<" not in shown and ">b<" not in shown


def test_the_log_and_warnings_go_the_same_way(monkeypatch):
    out = io.StringIO()
    log = logging.getLogger("py.warnings")
    monkeypatch.setattr(logging, "_warnings_showwarning", None)  # as if nobody had captured them yet
    monkeypatch.setattr(log, "handlers", [RichHandler(console=Console(file=out, width=200), show_path=False)])
    with warnings.catch_warnings():
        logging.captureWarnings(True)
        try:
            warnings.warn(f"odd {EVIL}", stacklevel=1)
        finally:
            logging.captureWarnings(False)
    assert "odd a\\u001b]0;x" in out.getvalue() and "\x1b" not in out.getvalue()


def test_a_stream_passes_on_colours_and_bars_alone():
    out = io.StringIO()
    _Patient(out).write(f"\r 50%\x1b[A\x1b[1;31mred\x1b[0m {EVIL}\n\t")
    assert out.getvalue() == f"\r 50%\x1b[A\x1b[1;31mred\x1b[0m {SPELLED.format(bell=chr(92) + 'u0007')}\n\t".replace(
        "\\u001b[8m", "\x1b[8m"
    )


def test_it_is_richs_console_otherwise():
    shown = []
    for kind in (Console, rich.console.Console):
        kind(file=(out := io.StringIO()), force_terminal=True, width=60).print(
            terminal(["a"], [["[b]1[/b] é 日"]], title="t")
        )
        shown.append(out.getvalue())
    assert shown[0] == shown[1]
