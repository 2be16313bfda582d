"""What every command of the project does alike: a mistake is one sentence, chatter goes to stderr or nowhere."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from spd_lens.errors import SPDError

INTERRUPTED = 130


def start(app: Callable[..., None], arguments: Sequence[str] | None = None, *, on_interrupt: str) -> None:
    """Run a typer app: a user's mistake is one sentence on stderr and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments))
    except SPDError as error:
        sentence = " ".join(str(error).splitlines())
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error:", "bold red"), " ", sentence))
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # what typer makes of Ctrl-C
            Console(stderr=True).print(Text(f"stopped; {on_interrupt}"))
        raise


def set_up_logging(quiet: bool) -> None:
    """Log to stderr; keep the libraries' chatter down."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    logging.getLogger("spd_lens").setLevel(logging.WARNING if quiet else logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def single_command(function: Callable[..., None]) -> typer.Typer:
    """A typer app that is one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app
