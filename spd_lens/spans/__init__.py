"""Which tokens count as correctness, in terminal and page."""

from spd_lens.spans.chain import Chain, Link, explain, scored_tokens
from spd_lens.spans.command import show_spans
from spd_lens.spans.core import Piece, audit
from spd_lens.spans.page import write_page
from spd_lens.spans.terminal import print_chain

__all__ = [
    "Chain", "Link", "Piece", "audit", "explain", "print_chain", "scored_tokens", "show_spans", "write_page",
]  # fmt: skip
