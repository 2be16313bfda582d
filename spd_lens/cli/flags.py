"""Command-line flags made from `SPDConfig`: one declaration per setting, in one place."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import TypeAdapter

from spd_lens.errors import SPDError, strictly
from spd_lens.runs import SPDConfig
from spd_lens.settings import Settings

Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show warnings only: no log, and no progress bars.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SubspaceFile = Annotated[Path | None, typer.Option("--subspace", help="Subspace file to project with.")]
AdapterDir = Annotated[Path | None, typer.Option("--adapter", help="Directory of a fine-tuned adapter.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else; what is not finite becomes null."""
    typer.echo(TypeAdapter(Any).dump_json(value, indent=2, fallback=str).decode())


# What may be said with a pair of flags instead of a value.
_SWITCHES = {
    "add_special_tokens": "--add-special-tokens/--no-add-special-tokens",
    "enable_thinking": "--enable-thinking/--no-enable-thinking",
    "allow_code_execution": "--allow-code-execution",
    "per_head": "--per-head/--joint",
    "across_heads": "--across-heads/--no-across-heads",
    "center_gradients": "--center-gradients/--no-center-gradients",
    "center": "--center/--no-center",
    "early_stop": "--early-stop/--no-early-stop",
    "retokenise": "--retokenise/--no-retokenise",
    "loss_on_padding": "--loss-on-padding/--no-loss-on-padding",
    "strict": "--strict/--no-strict",
}


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config` and a flag for each of some settings (all without names).

    The command is called with a `config: SPDConfig`: defaults, under the file, under the flags.
    """
    chosen = names or tuple(SPDConfig.model_fields)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(command).parameters.items() if name != "config"]
        hints = typing.get_type_hints(command, include_extras=True)

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            settings = {name: arguments.pop(name) for name in chosen}
            file, preset = arguments.pop("config"), arguments.pop("preset", None)
            overrides = {name: value for name, value in settings.items() if value is not None}
            if "task_options" in overrides:
                overrides["task_options"] = dict(_key_and_value(text) for text in overrides["task_options"])
                if not overrides["task_options"]:
                    del overrides["task_options"]  # no flag was given; typer passes an empty list
            config = SPDConfig.read(file, overrides, preset)
            with strictly(config.strict):
                command(config=config, **arguments)

        parameters = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [_parameter(name, chosen) for name in chosen]
        option = typer.Option("--config", help="YAML file with settings; flags override it.")
        parameters.append(_keyword("config", Annotated[Path | None, option]))
        if {"n_train", "n_eval"} <= set(chosen):
            text = "Sizes of a named preset (paper: tables 7-8); file and flags override them."
            parameters.append(_keyword("preset", Annotated[str | None, typer.Option("--preset", help=text)]))
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        return wrapper

    return decorate


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(name: str, chosen: Sequence[str]) -> inspect.Parameter:
    field = SPDConfig.model_fields[name]
    default = field.get_default(call_default_factory=True)
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    text = f"{field.description} (default: {shown})" if shown not in (None, {}, "") else field.description
    flags = [f"--{name.replace('_', '-')}"]
    if name == "generation_engine" and "engine" not in chosen:  # no other engine that the short name could mean
        flags.insert(0, "--engine")
    groups = [group for group in SPDConfig.__bases__ if issubclass(group, Settings)]
    panel = next(group.panel for group in groups if name in group.model_fields)
    if name == "task_options":
        option = typer.Option(
            "--task-option", help="KEY=VALUE, an option of the task; may be repeated.", rich_help_panel=panel
        )
        return _keyword(name, Annotated[list[str] | None, option])
    if name in _SWITCHES:
        return _keyword(name, Annotated[bool | None, typer.Option(_SWITCHES[name], help=text, rich_help_panel=panel)])
    return _keyword(
        name, Annotated[_plain(field.annotation) | None, typer.Option(*flags, help=text, rich_help_panel=panel)]
    )


def _plain(annotation: Any) -> Any:
    """The type that the command line parses; lists and choices are text here, and `SPDConfig` validates them."""
    parts = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    if typing.get_origin(annotation) is Literal:
        return str
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return parts[0] if len(parts) == 1 else str
    return annotation if annotation in (int, float, str, bool) else str


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise SPDError(f"--task-option {text!r} must be KEY=VALUE")
    for parse in (int, float):
        try:
            return key, parse(value)
        except ValueError:
            continue
    return key, {"true": True, "false": False}.get(value, value)
