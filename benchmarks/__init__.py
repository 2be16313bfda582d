"""Ratios against peers: what spd_lens costs beside the ways its users would otherwise take."""
