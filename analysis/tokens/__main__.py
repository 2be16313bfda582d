"""`python -m spd_lens.analysis.tokens`: the command `spd-lens analyze tokens`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["tokens", *sys.argv[1:]])
