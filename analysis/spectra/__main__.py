"""`python -m spd_lens.analysis.spectra`: the command `spd-lens analyze spectra`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["spectra", *sys.argv[1:]])
