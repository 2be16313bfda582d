"""What people read: the terminal, tables and pages."""

from spd_lens.output.console import Console, set_up_logging, single_command, start
from spd_lens.output.pages import render, source
from spd_lens.output.safe_text import inert, visible
from spd_lens.output.tables import markdown, terminal

__all__ = [
    "Console", "inert", "markdown", "render", "set_up_logging", "single_command", "source", "start", "terminal",
    "visible",
]  # fmt: skip
