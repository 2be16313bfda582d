"""Tables in CSV that are read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from spd_lens.errors import SPDError, one_line
from spd_lens.files.manifest import check_recorded
from spd_lens.files.stand_ins import refuse_stand_in


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """A table, with pandas' options; `SPDError` where the file is none, is missing, or is not what was written."""
    refuse_stand_in(path)
    check_recorded(path)
    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError, OverflowError) as error:  # not UTF-8 is a ValueError, as are all of pandas' own
        raise SPDError(f"{path} cannot be read as a table: {one_line(error)}") from error
