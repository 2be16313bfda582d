"""Commands about what a run leaves: exported, published, fetched, explained, found in weights, graded and verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from spd_lens.cli.flags import AsJson, Out, Quiet, print_json, with_settings
from spd_lens.errors import SPDError
from spd_lens.files import check_writable
from spd_lens.output import Console, set_up_logging
from spd_lens.runs import SPDConfig


@with_settings("model", "dtype", "device", "strength")
def export_command(
    config: SPDConfig,
    subspace: Annotated[Path, typer.Argument(help="Subspace file to project with.")],
    form: Annotated[
        Literal["lora", "checkpoint"], typer.Option("--as", help="A PEFT adapter, or the whole projected model.")
    ] = "lora",
    out: Out = Path("exported"),
    quiet: Quiet = False,
) -> None:
    """A projection for other engines: exactly as a LoRA adapter, or in the weights of a whole checkpoint."""
    set_up_logging(quiet)
    from spd_lens.runs import load_pair
    from spd_lens.subspaces import Subspace, fold_to, vllm_note

    check_writable(out, directory=True)
    kept = Subspace.load(subspace)
    pair = load_pair(config)
    if form == "lora":
        note = vllm_note(kept.to_lora(pair.hf, out, strength=config.strength))
    else:
        fold_to(pair.hf, kept, out, config.strength, tokenizer=pair.tokenizer)
        note = "every engine takes it as it takes the model itself"
    Console().print(f"written to {out}\n{note}", highlight=False, markup=False, soft_wrap=True)


def push_command(
    path: Annotated[Path, typer.Argument(help="A subspace's file, or the directory of an adapter or a checkpoint.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; it is made if it is not there.")],
    base_model: Annotated[str | None, typer.Option("--base-model", help="Hub name of the model it belongs to.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence of what is published: apache-2.0.")] = None,
    data_licence: Annotated[
        str | None, typer.Option("--data-license", help="Licence of the data; known for published benchmarks.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    sign_key: Annotated[Path | None, typer.Option("--sign-key", help="Private key (PEM) to sign it with.")] = None,
) -> None:
    """Publish a subspace, an adapter or a model on the hub, with a card made from what is known of it."""
    set_up_logging(quiet=True)
    from spd_lens.subspaces import push_to_hub

    address = push_to_hub(
        path, repository, base_model=base_model, licence=licence, data_licence=data_licence, private=private,
        sign_key=sign_key,
    )  # fmt: skip
    Console().print(f"published: {address}", highlight=False, markup=False, soft_wrap=True)


def pull_command(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    out: Annotated[Path, typer.Option("--out", help="The file of a subspace, or a directory.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit; else the newest.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="Public key (PEM); else nothing is verified.")] = None,
) -> None:
    """A subspace, an adapter or a model from the hub, checked: no pickled weights and no code."""
    set_up_logging(quiet=True)
    from spd_lens.subspaces import copy_from_hub

    found = copy_from_hub(repository, out, revision=revision, key=key)
    Console().print(f"written to {found}", highlight=False, markup=False)


def explain_command(
    path: Annotated[Path, typer.Argument(help="A run directory, an adapter, or a subspace's file.")],
    show: Annotated[int, typer.Option("--show", help="Calibration examples printed token by token.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", help="Also write every token that counted, as JSON.")] = None,
) -> None:
    """Which tokens shaped this model? Back to its calibration examples, every digest checked. Exit code 1 if broken."""
    set_up_logging(quiet=True)
    from spd_lens.files import write_json
    from spd_lens.spans import explain, print_chain, scored_tokens

    if out is not None:
        check_writable(out)
    chain = explain(path)
    print_chain(Console(), chain, show=show)
    if out is not None:
        links = [{"what": link.what, "says": link.says, "holds": link.holds} for link in chain.links]
        write_json(out, {"links": links, "tokens": list(scored_tokens(chain))})
    if not chain.holds:
        raise typer.Exit(1)


def detect_command(
    checkpoint: Annotated[str, typer.Argument(help="Model directory or hub name.")],
    base: Annotated[str | None, typer.Option("--base", help="The model that it was made from.")] = None,
    subspaces: Annotated[
        list[Path] | None, typer.Option("--subspaces", help="Subspace file to compare with; may be repeated.")
    ] = None,
    kinds: Annotated[str, typer.Option("--kinds", help="Which sites are looked at: k, v, q, z.")] = "k,v",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the directions that are left, as a subspace.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Has a projection been folded into these weights? Layers, heads and ranks, from the files alone."""
    set_up_logging(quiet=True)
    from spd_lens.subspaces import Subspace, detect

    if out is not None:
        check_writable(out)
    known = {str(path): Subspace.load(path) for path in subspaces or []}
    found = detect(checkpoint, base, kinds=[kind.strip() for kind in kinds.split(",")], subspaces=known)
    if out is not None and found.subspace is not None:
        found.subspace.save(out)
    if as_json:
        print_json(found.to_dict())
        return
    Console().print("\n".join(found.lines()), highlight=False, markup=False, soft_wrap=True)
    if out is not None and found.subspace is not None:
        Console().print(f"written to {out}", highlight=False, markup=False)


def grade_command(
    places: Annotated[list[Path], typer.Argument(help="Runs, studies and contests; those of other models, too.")],
    as_json: AsJson = False,
) -> None:
    """How far the evidence for subspaces and adapters reaches, from stored results (docs/evidence.md)."""
    from spd_lens.output import markdown
    from spd_lens.study import grades_of

    grades = grades_of(places)
    if as_json:
        print_json([{"of": path, "grade": str(grade), "reasons": grade.reasons} for path, grade in grades.items()])
        return
    rows = [[str(path), str(grade), grade.reasons[-1]] for path, grade in grades.items()]
    Console().print("\n".join(markdown(["of", "grade", "by"], rows)), highlight=False, markup=False, soft_wrap=True)


def verify_command(
    places: Annotated[list[Path], typer.Argument(help="Runs, studies, rounds, corpora or single files.")],
    as_json: AsJson = False,
) -> None:
    """Is every file what was written? Reads and hashes all of them again (docs/reliability.md); exit code 2 if not."""
    set_up_logging(quiet=True)
    from spd_lens.output import visible
    from spd_lens.runs import verify

    console, found = Console(), [verify(place) for place in places]
    damaged = [problem for one in found for problem in one.damaged]
    n_files, n_recorded = sum(one.n_files for one in found), sum(one.n_recorded for one in found)
    if as_json:
        print_json({"n_files": n_files, "n_recorded": n_recorded, "damaged": damaged})
    for problem in [] if as_json else damaged:
        console.print(visible(problem), highlight=False, markup=False, soft_wrap=True)
    if damaged:
        raise SPDError(f"{len(damaged)} of {n_files} files are not what was written")
    if not as_json:
        console.print(
            f"{n_files} files, {n_recorded} of them listed in a manifest.json: none is damaged", highlight=False
        )


COMMANDS: dict[str, Callable[..., Any]] = {
    "export": export_command,
    "push": push_command,
    "pull": pull_command,
    "explain": explain_command,
    "detect": detect_command,
    "grade": grade_command,
    "verify": verify_command,
}
