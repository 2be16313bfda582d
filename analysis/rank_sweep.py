"""`python -m spd_lens.analysis.rank_sweep`: the command `spd-lens analyze rank-sweep`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["rank_sweep", *sys.argv[1:]])
