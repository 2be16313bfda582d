"""`python -m spd_lens.analysis.calibration_size`: the command `spd-lens analyze calibration-size`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["calibration_size", *sys.argv[1:]])
