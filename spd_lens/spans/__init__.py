"""Which tokens count as correctness, in terminal and page."""

from spd_lens.spans.command import show_spans
from spd_lens.spans.core import Piece, audit
from spd_lens.spans.page import write_page

__all__ = ["Piece", "audit", "show_spans", "write_page"]
