"""`python -m spd_lens.analysis.estimators`: the command `spd-lens analyze estimators`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["estimators", *sys.argv[1:]])
