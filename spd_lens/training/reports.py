"""Where the loss log goes while it grows: the trackers that transformers knows."""

from __future__ import annotations

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from spd_lens.errors import SPDError


def check_report_to(report_to: str) -> None:
    """Raise `SPDError` where a training could not report to each of these names."""
    for name in report_to.split(","):
        if name == "none":
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise SPDError(f"report_to is {name!r}; write none, or names with commas between them: {known}")
        if name not in get_available_reporting_integrations():
            raise SPDError(f"report_to is {name!r}, and its package is not installed; install it (pip install {name})")
