"""`python -m spd_lens.analysis.gain`: the command `spd-lens analyze gain`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["gain", *sys.argv[1:]])
