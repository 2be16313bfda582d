"""`python -m spd_lens.analysis.layer_sweep`: the command `spd-lens analyze layer-sweep`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["layer_sweep", *sys.argv[1:]])
