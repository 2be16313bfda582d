"""The command line."""

from spd_lens.cli.commands import main

__all__ = ["main"]
