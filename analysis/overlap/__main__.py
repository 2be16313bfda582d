"""`python -m spd_lens.analysis.overlap`: the command `spd-lens analyze overlap`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["overlap", *sys.argv[1:]])
