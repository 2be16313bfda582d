"""A protocol by its name, and what it leaves of a user's own settings: all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spd_lens.errors import SPDError
from spd_lens.protocols.base import NAMES, Protocol
from spd_lens.protocols.presets import PROTOCOLS


def protocol(name: str) -> Protocol:
    """A protocol by its name: `"paper"`, `"reference"` or `"apple-ssd"`.

    `spd.protocol("reference").training` is what `finetune(settings=...)` takes, and so on; `SPDConfig.make({"protocol":
    "reference"})` has it all.

    Raises:
        SPDError: There is no such protocol.
    """
    if name not in PROTOCOLS:
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
    source, targets = given.get("task", "gsm8k"), given.get("eval_tasks") or []
    targets = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else targets
    under = dict(chosen.settings)
    if isinstance(source, str) and isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        under |= chosen.sizes_for(source, targets or [source], n_eval)
    return {**under, **given}


def departures(config: Any, n_eval: int) -> dict[str, tuple[Any, Any]]:
    """Settings of a config that are not its protocol's: the protocol's value and the config's, by name."""
    named = {"protocol": config.protocol, "task": config.task, "eval_tasks": config.eval_tasks}
    asked = {name: value for name, value in with_protocol(named, n_eval).items() if name not in named}
    return {name: (value, getattr(config, name)) for name, value in asked.items() if getattr(config, name) != value}
