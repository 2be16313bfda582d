"""The commands of the dashboard: one that writes the page, and one that serves it with a tab that generates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spd_lens.analysis.common import subjects
from spd_lens.analysis.dashboard.document import assemble
from spd_lens.analysis.dashboard.page import page
from spd_lens.analysis.dashboard.records import relative_to
from spd_lens.errors import SPDError
from spd_lens.files import write_text


def write_dashboard(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of one or more run directories.

    Args:
        runs: Run directories of the same or of different models; the first is shown first.
        out: The page, about 5 MB, most of it plotly. It works from `file://` and makes no request.

    Raises:
        SPDError: No run, a directory that is no run or has no moments yet, or a place that cannot be written.
    """
    if not runs:
        raise SPDError("there is no run to show; name at least one run directory")
    out = Path(out)
    if out.is_dir():
        raise SPDError(f"{out} is a directory; name the page to write, as in --out {out / 'dashboard.html'}")
    found = subjects(runs)
    document = assemble(found, link=relative_to(out))
    return write_text(out, page(document, title=f"SPD dashboard: {', '.join(subject.name for subject in found)}"))


def serve(runs: Sequence[str | Path], *, port: int = 8050) -> None:
    """Run the live app on this machine until it is interrupted; needs the extra `dashboard`."""
    try:
        from spd_lens.analysis.dashboard.server import serve as serve_live
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("flask", "werkzeug"):
            raise
        raise SPDError("the live app needs flask; install it with pip install 'spd-lens[dashboard]'") from error
    serve_live(runs, port=port)
