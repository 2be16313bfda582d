"""`python -m spd_lens.analysis.tables`: the command `spd-lens analyze tables`."""

import sys

from spd_lens.analysis.index import analyze

if __name__ == "__main__":
    analyze(["tables", *sys.argv[1:]])
