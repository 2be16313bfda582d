"""`explore`: the dashboard's views of objects in memory, in a notebook's output or as a file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from spd_lens.analysis.dashboard.document import from_sources
from spd_lens.analysis.dashboard.page import page
from spd_lens.analysis.dashboard.rank_curves import Source
from spd_lens.errors import SPDError
from spd_lens.files import write_text
from spd_lens.subspaces import GradientMoments, Subspace


class Explorer:
    """A page of views. A notebook shows the last value of a cell; the selectors need no kernel."""

    def __init__(self, html: str) -> None:
        self.html = html
        """The whole page; it makes no request."""

    def __repr__(self) -> str:
        return f"Explorer({len(self.html) / 1e6:.1f} MB of HTML; shown in a notebook, or written with .save(path))"

    def _repr_html_(self) -> str:
        # a frame with its own document: the page's styles and scripts stay apart from the notebook's
        return (
            f'<iframe title="SPD dashboard" srcdoc="{escape(self.html, quote=True)}" '
            f'style="width:100%;height:900px;border:0" sandbox="allow-scripts"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page as a file."""
        return write_text(path, self.html)


def explore(
    subspace: Subspace,
    moments: GradientMoments | None = None,
    *,
    others: Mapping[str, Subspace | GradientMoments] | None = None,
) -> Explorer:
    """Spectra, energies, overlaps and layer × head maps of a subspace, linked by site, head and rank.

    Args:
        subspace: The subspace. Without moments there are its spectrum, and its angles with other subspaces.
        moments: The moments it came from. They add every rank, the energies of gradients and activations, and
            split halves.
        others: Further subspaces or moments by their labels, to compare with. Energies need moments.
    """
    if moments is not None and not any(site in moments.sites for site in subspace.sites):
        raise SPDError(f"the moments have none of the subspace's sites {', '.join(map(str, subspace.sites))}")
    sources = [Source("this", moments, subspace)]
    for label, other in (others or {}).items():
        if isinstance(other, GradientMoments):
            sources.append(Source(label, other))
        elif isinstance(other, Subspace):
            sources.append(Source(label, subspace=other))
        else:
            raise SPDError(f"others[{label!r}] is a {type(other).__name__}; give a Subspace or GradientMoments")
    if "this" in (others or {}):
        raise SPDError("two of the subspaces are called 'this'; give the other one another label")
    return Explorer(page(from_sources(sources), title="Subspace: this", look="embedded"))
