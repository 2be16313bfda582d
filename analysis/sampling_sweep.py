"""`python -m spd_lens.analysis.sampling_sweep`: the command `spd-lens analyze sampling-sweep`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["sampling_sweep", *sys.argv[1:]])
