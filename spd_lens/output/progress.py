"""The progress bar of a long stage."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(shown: bool, **how: Any) -> Any:
    """A bar of tqdm's, on a terminal or in a notebook alone: a log file gets no half-drawn lines."""
    return tqdm(**how, disable=None if shown else True)
