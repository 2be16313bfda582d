"""The dashboard: runs as one self-contained page, as a live app that generates, and inside a notebook.

One page serves all three: `write_dashboard` writes it, `serve` frames it beside the generator, `explore` shows it in a
notebook's output, where it works without a kernel too.
"""

from spd_lens.analysis.dashboard.command import serve, write_dashboard
from spd_lens.analysis.dashboard.notebook import Explorer, explore

__all__ = ["Explorer", "explore", "serve", "write_dashboard"]
