"""What may stand in a file that is read back: types exactly as written, no unknown keys, finite numbers."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from spd_lens.errors import DamagedFile, shortened

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For pydantic: a text is no number and 1 is not true, keys that are not declared are an error, and so are NaN and
infinity. Dataclasses that stand in files take it by `pydantic.with_config`."""
_T = TypeVar("_T")


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("it is no number")
    return value


Loss = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_no_nan)]
"""A loss or a divergence, in nats: infinite where a policy gives a token no probability, but a number."""


class Schema(BaseModel):
    """A table in a file, with its keys and their types."""

    model_config = STRICT | ConfigDict(frozen=True)


def fitting(kind: type[_T], value: Any, path: str | Path) -> _T:
    """A JSON value as the type that it should have; `DamagedFile` that names the first place where it has not.

    Args:
        kind: A `Schema`, a dataclass, or a type made of these, such as `dict[str, list[ForcedItem]]`.
        value: What was read.
        path: The file, for the message.
    """
    hashable: Any = kind
    try:
        # from JSON, since of Python's own values the strict mode would take instances of the class alone
        return _adapter(hashable).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"])) or "its content"
        found = "" if problem["type"] in ("missing", "extra_forbidden") else f" ({problem['input']!r:.60})"
        raise DamagedFile(
            f"{path} is damaged at {shortened(place, 100)}{found}: {problem['msg']}; make it again"
        ) from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
