"""Where the loss log goes while it grows: the trackers that transformers knows."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from spd_lens.errors import SPDError


def trackers(report_to: str) -> list[str]:
    """The trackers that a setting names, with commas between them; none for `"none"`.

    Raises:
        SPDError: transformers does not know a name, or its package is not installed.
    """
    names = [] if report_to == "none" else [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise SPDError(f"report_to is {name!r}; write none, or names with commas between them: {known}")
        if name not in get_available_reporting_integrations():
            raise SPDError(
                f"report_to is {name!r}, and the package of that name is not installed; install it (pip install "
                f"{name.replace('_', '-')}), or leave report_to out"
            )
    return names


def keep_logs(directory: Path) -> None:
    """Let TensorBoard's files be beside a training's result: by default they would go with its checkpoints."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(directory.with_name(f"{directory.name}.tensorboard")))
