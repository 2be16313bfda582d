"""A protocol by its name, and what it leaves of a user's own settings: all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.protocols.base import NAMES, Protocol
from spd_lens.protocols.presets import POINTS, PROTOCOLS


def protocol(name: str) -> Protocol:
    """A protocol by its name: `"paper"`, `"reference"` or `"apple-ssd"`.

    `spd.protocol("reference").training` is what `finetune(settings=...)` takes, and so on; `SPDConfig.make({"protocol":
    "reference"})` has it all.

    Raises:
        SPDError: There is no such protocol.
    """
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise SPDError(f"unknown protocol {name!r}; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def with_protocol(given: Mapping[str, Any], n_eval: int) -> dict[str, Any]:
    """Settings of a config with those of the protocol that they name under them.

    A protocol that there is not and tasks that are no names are left for the validation, which says so.

    Args:
        given: What files, flags and keywords say; nothing of it changes.
        n_eval: Test items of a task that the protocol does not know.
    """
    name = given.get("protocol", NAMES[0])
    if not isinstance(name, str) or name not in NAMES:
        return dict(given)
    chosen = protocol(name)
    own = {"eval_tasks": _listed(given["eval_tasks"])} if "eval_tasks" in given else {}
    source, targets = given.get("task", "gsm8k"), own.get("eval_tasks", [])
    under = dict(chosen.settings)
    if isinstance(source, str) and isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        under |= chosen.sizes_for(source, targets or [source], n_eval)
    return {**under, **given, **own}


def _listed(targets: Any) -> Any:
    """Tasks as a list, however they are written: commas between them, a tuple, anything that is gone through once."""
    if isinstance(targets, str):
        return [part.strip() for part in targets.split(",") if part.strip()]
    return list(targets) if isinstance(targets, Iterable) and not isinstance(targets, Mapping | bytes) else targets


def departures(config: Any, n_eval: int) -> dict[str, tuple[Any, Any]]:
    """What of a config is not as its protocol has it: the protocol's value and the config's, by name.

    Settings that decide one of the protocol's points are looked at, whether the protocol names them or leaves them at
    their default, and options of the source task (`task_options.scoring`). It has no sizes for tasks that it does not
    know, and none of the protocols decides the precision.
    """
    named = {"protocol": config.protocol, "task": config.task, "eval_tasks": config.eval_tasks}
    asked, alone = with_protocol(named, n_eval), type(config)(**named)
    decides = [name for names in POINTS.values() for name in names if name in type(config).model_fields]
    loose = {"dtype"} | {name for name in _SIZES if name not in asked}
    values = {name: (getattr(alone, name), getattr(config, name)) for name in decides if name not in loose}
    own = protocol(config.protocol).options(config.task)
    values |= {f"task_options.{name}": (own.get(name), value) for name, value in config.task_options.items()}
    return {name: both for name, both in values.items() if _written(both[0]) != _written(both[1])}


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)  # rank 1 is one direction, and 1.0 is all


_SIZES = ("n_calibration", "n_train", "n_eval")
