"""`python -m spd_lens`."""

from spd_lens.cli import main

main()
