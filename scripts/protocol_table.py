"""Write the table of docs/protocols.md from the presets: `python scripts/protocol_table.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from spd_lens.protocols import POINTS, PROTOCOLS, Protocol
from spd_lens.runs import SPDConfig
from spd_lens.study import StudyConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "protocols.md"
_TASKS = ("gsm8k", "svamp", "mbpp", "codealpaca", "mmlu", "bbh")
_OPTIONS = {"prompt_template", "train_source", "order", "scoring", "subtasks"}


def table() -> str:
    """The protocols beside the first, each point with its settings, what is to be known beside them, and the source.

    The last one has no projection and changes little. It has a table of its own with the points that it decides.
    """
    paper, *others = PROTOCOLS.values()
    first, second = others
    lines = [*_head(paper, first)]
    lines += [f"| {point} | {cell(paper, point, paper)} | {cell(first, point, paper)} |" for point in POINTS]
    own = [point for point in POINTS if second.sources[point] != ("", "no source")]
    lines += ["", *_head(second), *(f"| {point} | {cell(second, point, paper)} |" for point in own)]
    return "\n".join(lines)


def _head(*chosen: Protocol) -> list[str]:
    names = " | ".join(f"`{found.name}`" for found in chosen)
    return [f"| | {names} |", "| --- " * (len(chosen) + 1) + "|"]


def cell(chosen: Protocol, point: str, paper: Protocol) -> str:
    """The values of one point under one protocol, of which those that the paper's protocol has too are said once."""
    values = {name: shown for name in POINTS[point] if (shown := value(chosen, name))}
    own = {name: shown for name, shown in values.items() if chosen is paper or shown != value(paper, name)}
    listed = [f"`{name}` {shown}" for name, shown in own.items()]
    if len(own) < len(values):
        listed.append(f"the rest as `{paper.name}`" if own else f"settings as `{paper.name}`")
    source = chosen.sources[point]
    return "<br>".join(part for part in (", ".join(listed), source.value, f"*{source.where}*") if part)


def value(chosen: Protocol, name: str) -> str:
    """A setting, an option of tasks or a size under a protocol, in words; nothing for an option that it leaves."""
    if name == "methods":
        return ", ".join(chosen.methods or StudyConfig.model_fields["methods"].default)
    if name in ("n_train", "n_eval", "n_calibration") and chosen.sizes:
        by_task = {task: size[name] for task, size in chosen.sizes.items() if name in size}
        return _by_task(by_task)
    if name == "test tokens":
        options = {task: chosen.task_options.get(task, {}).get("max_new_tokens") for task in _TASKS}
        return _by_task({task: n for task, n in options.items() if n is not None})
    if name in _OPTIONS:
        by_task = {task: options[name] for task in _TASKS if name in (options := chosen.options(task))}
        return _by_task(by_task)
    return text(getattr(SPDConfig.make({"protocol": chosen.name}), name))


def _by_task(values: dict[str, Any]) -> str:
    one = {text(found) for found in values.values()}
    if len(one) == 1 and len(values) > 1:
        return one.pop()
    return ", ".join(f"{text(found)} ({task})" for task, found in values.items())


def text(found: Any) -> str:
    """A value as a reader writes it."""
    if found is None or isinstance(found, bool):
        return {None: "not set", True: "on", False: "off"}[found]
    if isinstance(found, list):
        return ", ".join(map(str, found))
    return f"{found:g}" if isinstance(found, float) else str(found)


def written(document: str) -> str:
    """The document with the table that the presets make."""
    return re.sub(
        r"(<!-- begin table -->\n).*?(\n<!-- end table -->)",
        lambda found: found[1] + table() + found[2], document, flags=re.DOTALL,
    )  # fmt: skip


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
