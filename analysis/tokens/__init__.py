"""Where in the text does the gradient sit?"""

from spd_lens.analysis.tokens.command import category_shares, say, share_figure, token_energy

__all__ = ["category_shares", "say", "share_figure", "token_energy"]
