"""Saved rank and layer sweeps, as the page draws them."""

from __future__ import annotations

from typing import Any

from ..inputs import Subject


def rank_sweep(subject: Subject) -> dict[str, Any] | None:
    return None


def layer_sweep(subject: Subject) -> dict[str, Any] | None:
    return None
