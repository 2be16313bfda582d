"""`python -m spd_lens.analysis.directions`: the command `spd-lens analyze directions`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["directions", *sys.argv[1:]])
