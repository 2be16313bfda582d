"""`explain`: which tokens shaped this model? From adapter to corpus, subspace, examples and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spd_lens.errors import UNREADABLE, SPDError
from spd_lens.files import damage, read_json
from spd_lens.generation import Corpus, corpus_digest
from spd_lens.models import Fingerprint, PromptFormat, load_tokenizer
from spd_lens.runs import Experiment, Run, examples_digest
from spd_lens.spans.core import Audit, audit
from spd_lens.subspaces import GradientMoments, Subspace, squared_cosines

_T = TypeVar("_T")

SAME = 1 - 1e-6
"""From this overlap on a subspace is the one that follows from its moments: eigenvectors differ between processors."""
_TRAINED, _EXPORTED = "training.json", "projection.json"


@dataclass(frozen=True)
class Link:
    """One artefact of the chain."""

    what: str
    """What it is, such as `corpus`."""
    says: str
    """What is known of it, and how it leads to the next."""
    holds: bool | None
    """Whether its digests are those that the artefact before it was made from; None where nothing could be compared."""


@dataclass(frozen=True)
class Chain:
    """The artefacts behind an adapter or a subspace, the nearest first, and the tokens at its end."""

    links: tuple[Link, ...]
    tokens: Audit | None
    """The calibration examples by token, with those that were scored; None where the chain does not reach them."""

    @property
    def holds(self) -> bool:
        """Whether no link is broken. One that could not be checked is not broken."""
        return all(link.holds is not False for link in self.links)


def explain(path: str | Path) -> Chain:
    """Follow a run, an adapter or a subspace back to the tokens that its gradients come from.

    Every digest that an artefact recorded of another is compared with what lies there now: the adapter's files, the
    corpus, the subspace, the model's fingerprint and weights, the data and the calibration examples. No weight of a
    model is read; the tokenizer is, for the tokens.

    Args:
        path: A run directory, the adapter in one, an adapter that `to_lora` wrote, or a subspace's file. What lies
            beside it, where a run puts it, is followed.

    Raises:
        SPDError: there is no such thing, or it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        Subspace.load(path)  # what is asked about itself must be one
        return _of_folder(path.absolute().parent, None, path)
    if (path / "config.yaml").exists():
        return _of_folder(path, path / "adapter", path / "subspace.safetensors")
    if (path / _TRAINED).exists():
        return _of_folder(path.absolute().parent, path, path.absolute().parent / "subspace.safetensors")
    if (path / _EXPORTED).exists():
        return _of_export(path)
    raise SPDError(
        f"{path} is no run directory, no adapter of spd_lens (it has neither {_TRAINED} nor {_EXPORTED}) and no file "
        "of a subspace; give one of these"
    )


def _of_folder(folder: Path, adapter: Path | None, subspace: Path) -> Chain:
    """The chain of artefacts that lie as a run lays them: each is left out where it is not there."""
    run = Run.open(folder) if (folder / "config.yaml").exists() else None
    notes = {} if run is None else run.notes
    damaged: list[Link] = []
    corpus = None if adapter is None else _there("corpus", folder / "corpus.jsonl", Corpus.load, damaged)
    kept = _there("subspace", subspace, Subspace.load, damaged)
    links: list[Link] = []
    if adapter is not None and (adapter / _TRAINED).exists():
        links.append(_adapter(adapter, corpus, notes))
    if corpus is not None:
        links.append(_corpus(corpus, kept, notes))
    links += damaged
    if kept is None:
        return Chain(tuple(links), None)
    moments = _there("moments", folder / "moments.safetensors", GradientMoments.load, links)
    links.append(_subspace(subspace, kept, moments, run))
    if run is None:
        return Chain((*links, _unseen(kept)), None)
    data, tokens = _examples(run, kept)
    return Chain((*links, *data), tokens)


def _there(what: str, place: Path, load: Callable[[Path], _T], damaged: list[Link]) -> _T | None:
    """An artefact, or None where it is missing; one that cannot be read is a link that does not hold."""
    try:
        return load(place) if place.exists() else None
    except SPDError as error:
        damaged.append(Link(what, str(error), False))
        return None


def _of_export(adapter: Path) -> Chain:
    made = read_json(adapter / _EXPORTED)
    try:
        says = (
            f"a projection, written as a LoRA adapter and not trained: subspace {made['subspace']}, strength "
            f"{made['strength']:g}, for the weights {made['weights']} of {made['model']}"
        )
    except UNREADABLE as error:
        raise SPDError(f"{adapter / _EXPORTED} is damaged ({error!r}); export the subspace again") from error
    beside = sorted(adapter.absolute().parent.glob("*.safetensors"))
    found = [place for place in beside if _is_subspace(place, made["subspace"])]
    link = Link("adapter", says, True if found else None)
    if not found:
        ends = Link("subspace", "not beside the adapter; explain its file to go on", None)
        return Chain((link, ends), None)
    rest = _of_folder(found[0].parent, None, found[0])
    return Chain((link, *rest.links), rest.tokens)


def _is_subspace(place: Path, digest: str) -> bool:
    try:
        return Subspace.load(place).digest() == digest
    except SPDError:
        return False


def _adapter(adapter: Path, corpus: Corpus | None, notes: Mapping[str, Any]) -> Link:
    made = read_json(adapter / _TRAINED)
    try:
        settings = made["settings"]
        says = f"{settings['method']} on {made['n_sequences']} completions of corpus {settings['corpus']}"
        faults = [damage(adapter, made["files"])] if "files" in made else []
        if corpus is not None and (found := corpus_digest(corpus)) != settings["corpus"]:
            faults.append(f"the corpus beside it is {found}")
        if notes.get("weights", settings["weights"]) != settings["weights"]:
            faults.append("it was trained from other weights than those of the run")
    except UNREADABLE as error:
        raise SPDError(f"{adapter / _TRAINED} is damaged ({error!r}); train the adapter again") from error
    return _link("adapter", says, faults, checked=corpus is not None)


def _corpus(corpus: Corpus, subspace: Subspace | None, notes: Mapping[str, Any]) -> Link:
    settings = corpus.settings
    digest, faults = settings.get("subspace"), []
    under = f"under subspace {digest}, strength {settings.get('strength', 1.0):g}" if digest else "without a projection"
    if digest and subspace is not None and subspace.digest() != digest:
        faults.append(f"the subspace beside it is {subspace.digest()}")
    if notes.get("weights") and settings.get("weights", notes["weights"]) != notes["weights"]:
        faults.append("it was written with other weights than those of the run")
    model = None if subspace is None else subspace.fingerprint
    if model is not None and (own := settings.get("fingerprint")):
        faults += _refusal(lambda: Fingerprint.from_dict(own).check(model, "it"))
    return _link("corpus", f"{len(corpus)} completions, {under}", faults, checked=bool(digest) and subspace is not None)


def _subspace(place: Path, subspace: Subspace, moments: GradientMoments | None, run: Run | None) -> Link:
    origin = subspace.origin
    counts = ", ".join(f"{origin[n]} {said}" for n, said in _COUNTS.items() if n in origin)
    says = f"{subspace.digest()} in {place.name}, {', '.join(map(str, subspace.sites))}; {counts or dict(origin)}"
    faults: list[str | None] = []
    if moments is not None and (model := subspace.fingerprint) is not None:
        faults += _refusal(lambda: moments.fingerprint.check(model, "the moments"))
    follows = False
    if run is not None and moments is not None and run.config.estimator == "paper" and not faults:
        follows = True
        if (share := _overlap(subspace, Experiment.opened(run).subspace(moments))) < SAME:
            faults.append(f"it does not follow from the moments beside it (overlap {share:.4f})")
    weights = subspace.provenance.get("weights")
    if run is not None and weights and run.notes.get("weights", weights) != weights:
        faults.append("it was taken from other weights than those of the run")
    return _link("subspace", says, faults, checked=follows or bool(weights and run))


_COUNTS = {"n_examples": "calibration examples", "n_tokens": "tokens", "n_scored": "of them scored"}


def _overlap(one: Subspace, other: Subspace) -> float:
    """The share of directions that two subspaces have in common; 0 for other sites or ranks."""
    if one.ranks != other.ranks:
        return 0.0
    shared = [
        (float(squared_cosines(a, b)), a.shape[1])
        for site in one.sites
        for a, b in zip(one.blocks(site), other.blocks(site), strict=True)
    ]
    return sum(both for both, _ in shared) / max(1, sum(rank for _, rank in shared))


def _unseen(subspace: Subspace) -> Link:
    known = subspace.provenance
    if not known:
        return Link("examples", "there is no run around the subspace, and its file names no data", None)
    of = f"{known.get('task')} with {known.get('model')}, examples {known.get('examples', 'unknown')[:16]}"
    return Link("examples", f"{of}; there is no run around the subspace that could draw them again", None)


def _examples(run: Run, subspace: Subspace) -> tuple[list[Link], Audit | None]:
    """The data and the calibration examples, drawn again, and their tokens."""
    config, experiment = run.config, Experiment.opened(run, progress=False)
    try:
        examples = experiment.calibration
        now, then = experiment.task.sources(), run.notes.get("data", {})
    except SPDError as error:
        return [Link("examples", f"the data cannot be read here: {error}", None)], None
    changed = [f"{name} has changed" for name, sha256 in then.items() if now.get(name) != sha256]
    data = _link(
        "data", ", ".join(f"{name} {sha256[:16]}" for name, sha256 in now.items()), changed, checked=bool(then)
    )
    known, faults = subspace.provenance.get("examples"), []
    if known and known != examples_digest(examples):
        faults.append("drawn again they are others than those that the subspace was made from")
    says = f"{len(examples)} of {config.task}, drawn with seed {config.data_seed}"
    counted = subspace.origin.get("n_examples", len(examples)) == len(examples)
    faults += [] if counted else [f"the subspace is of {subspace.origin['n_examples']}"]
    link = _link("examples", says, faults, checked=bool(known))
    try:
        found = audit(examples, _format(run), config.loss, task=experiment.task.name)
    except SPDError as error:
        return [data, link, Link("tokens", f"the tokenizer cannot be read here: {error}", None)], None
    scored = sum(found.sizes)
    total = sum(piece.id is not None for item in found.examples for piece in item.pieces)
    same = subspace.origin.get("n_scored", scored) == scored
    says = f"{scored} of {total} tokens count as correctness ({config.loss} loss)"
    fault = [] if same else [f"the subspace is of {subspace.origin['n_scored']}"]
    return [data, link, _link("tokens", says, fault, checked="n_scored" in subspace.origin)], found


def _format(run: Run) -> PromptFormat:
    config = run.config
    return PromptFormat.choose(
        load_tokenizer(config.model), config.prompt_format, config.system, config.enable_thinking,
        config.prompt_date or run.notes.get("prompt_date"),
        add_special_tokens=config.add_special_tokens, span_rule=config.span_rule,
    )  # fmt: skip


def _refusal(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except SPDError as error:
        return [str(error)]
    return []


def _link(what: str, says: str, faults: list[str | None] | list[str], *, checked: bool) -> Link:
    found = [fault for fault in faults if fault]
    return Link(what, "; ".join([says, *found]), False if found else (True if checked else None))


def scored_tokens(chain: Chain) -> Iterator[dict[str, Any]]:
    """Every token that counted, as plain data: the example's id, the token, its text, position, and weight.

    The weight is the share of the token in the loss of all examples, `1 / (|S| · examples)` (Eq. 6): which token the
    gradient came from, not how large it was.
    """
    items = chain.tokens.examples if chain.tokens else ()
    for item in items:
        for piece in item.pieces:
            if piece.scored:
                weight = 1 / item.size / len(items)
                yield {
                    "example": item.example.id, "position": piece.position, "token": piece.id, "text": piece.text,
                    "weight": weight,
                }  # fmt: skip
