"""What all commands share: a mistake of the user is one sentence, and logs go to stderr."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.protocol
import typer
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

from spd_lens.errors import Guardrail, SPDError
from spd_lens.output.safe_text import visible

log = logging.getLogger(__name__)

INTERRUPTED = 130
_NEAREST = dict(zip("⟦⟧│↵·×–—−→•■", "[]|/-x--->*#", strict=True))
"""Plain characters in place of those in our own output, for terminals that lack them."""


def _nearest(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_NEAREST.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error("spd_lens.nearest", _nearest)

_OURS = re.compile(r"(\x1b\[[0-9;]*m|\x1b\[A|\r)")
"""What rich and tqdm write to a terminal themselves: colours, a line up, back to the beginning of the line."""


class Console(rich.console.Console):
    """A terminal on which texts of models, data and files are only text: their control characters are spelled out.

    Everything that the library shows goes through it; its own colours are no part of the texts and stay.
    """

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of what is shown, each text in them made `visible`."""
        shown = rich.protocol.rich_cast(renderable)
        if isinstance(shown, str):
            renderable = visible(shown)  # before it is laid out, where its width counts
        elif isinstance(shown, Text) and (plain := visible(shown.plain)) != shown.plain:
            renderable = Text(plain, shown.style, justify=shown.justify, overflow=shown.overflow, end=shown.end)
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def start(app: Callable[..., None], arguments: Sequence[str] | None = None, *, on_interrupt: str) -> None:
    """Run a typer app: a user's mistake is one sentence on stderr and exit code 2.

    Output that cannot be delivered stops no work: the command does all it has to do and then says so, with exit code 1.
    """
    with _patient_streams() as lost:
        try:
            app(args=None if arguments is None else list(arguments))
        except SPDError as error:
            _say_error(" ".join(str(error).splitlines()))
            sys.exit(2)
        except SystemExit as stop:
            if stop.code == INTERRUPTED:  # what typer makes of Ctrl-C
                Console(stderr=True).print(Text(f"stopped; {on_interrupt}"))
            if lost() is None or stop.code not in (0, None):
                raise
        if reason := lost():
            _say_error(f"the output could not be shown ({reason}); what the command wrote to files is there")
            sys.exit(1)


def _say_error(sentence: str) -> None:
    text = Text.assemble(("error:", "bold red"), " ", visible(sentence))  # rich drops some without a word
    Console(stderr=True, soft_wrap=True).print(text)


class _Patient:
    """A standard stream that never stops work: what its encoding lacks is replaced, after a failure it is silent.

    Of control characters it passes on colours and what a progress bar needs, whoever writes them.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        """The stream itself; None where the process was started without one."""
        self.failure: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self.stream.flush())

    def _write(self, text: str) -> None:
        text = "".join(part if _OURS.fullmatch(part) else visible(part) for part in _OURS.split(text))
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.stream.write(text.encode(encoding, "spd_lens.nearest").decode(encoding))

    def _attempt(self, output: Callable[[], object]) -> None:
        if self.stream is None:
            self.failure = "it is closed"
        if self.failure is not None:
            return
        try:
            output()
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            self.failure = getattr(error, "strerror", None) or str(error)
            with contextlib.suppress(OSError, ValueError):
                # what is still in its buffer would fail again when the process ends
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def _patient_streams() -> Iterator[Callable[[], str | None]]:
    """While open, output that fails stops no work; yields a function that says why stdout failed, None if it did not.

    Within a command that another command runs, it is the outer one that reports.
    """
    if isinstance(sys.stdout, _Patient):
        yield lambda: None
        return
    for descriptor in (0, 1, 2):  # one that is closed would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = patient, _ = _Patient(out), _Patient(err)

    def lost() -> str | None:
        if out is not None:
            patient.flush()
        return patient.failure

    try:
        yield lost
    finally:
        sys.stdout, sys.stderr = out, err


def log_to(path: Path) -> None:
    """Also write the log of `spd_lens` to a file, at its end: a line each with date, level and where it comes from.

    Raises:
        SPDError: the file cannot be written.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise SPDError(f"cannot write the log {path}: {error.strerror}; choose another --log-file") from error
    handler.setFormatter(_Plain("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("spd_lens", "py.warnings"):
        logging.getLogger(name).addHandler(handler)


class _Plain(logging.Formatter):
    """Control characters of a stranger's text are spelled out here too."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def set_up_logging(quiet: bool, *, errors_only: bool = False) -> None:
    """Log to stderr, only warnings if `quiet`, and silence the notices of other libraries.

    `errors_only`: not even warnings, in a process whose neighbour says the same.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    level = logging.ERROR if errors_only else logging.WARNING if quiet else logging.INFO
    logging.getLogger("spd_lens").setLevel(level)
    logging.captureWarnings(True)  # they may quote a file
    _log_guardrails()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _log_guardrails() -> None:
    """Show what guardrails say as the log shows its warnings, a sentence without the line of code."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Guardrail):
            log.warning("%s", message)
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show


def single_command(function: Callable[..., None]) -> typer.Typer:
    """A typer app that is one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app
