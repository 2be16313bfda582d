"""`python -m spd_lens.analysis.heads`: the command `spd-lens analyze heads`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["heads", *sys.argv[1:]])
