"""Analyses of subspaces and runs: spectra, overlap, rank and layer sweeps, tables, figures, the dashboard.

Imported as `spd_lens.analysis`. Each module can also be run: `python -m spd_lens.analysis.<module> --help`.
"""

from spd_lens.analysis.index import ANALYSES

__all__ = ["ANALYSES"]
