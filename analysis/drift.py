"""`python -m spd_lens.analysis.drift`: the command `spd-lens analyze drift`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["drift", *sys.argv[1:]])
