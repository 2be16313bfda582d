"""What people read: the terminal, tables and pages."""

from spd_lens.output.console import Console, log_to, set_up_logging, single_command, start
from spd_lens.output.pages import render, source
from spd_lens.output.progress import progress_bar
from spd_lens.output.safe_text import inert, visible
from spd_lens.output.tables import markdown, terminal

__all__ = [
    "Console", "inert", "log_to", "markdown", "progress_bar", "render", "set_up_logging", "single_command", "source",
    "start", "terminal", "visible",
]  # fmt: skip
