"""What people read: the terminal, tables and pages."""

from spd_lens.output.console import set_up_logging, single_command, start
from spd_lens.output.pages import render, source
from spd_lens.output.safe_text import visible
from spd_lens.output.tables import markdown, terminal

__all__ = ["markdown", "render", "set_up_logging", "single_command", "source", "start", "terminal", "visible"]
