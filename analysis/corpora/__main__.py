"""`python -m spd_lens.analysis.corpora`: the command `spd-lens analyze corpora`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["corpora", *sys.argv[1:]])
