"""To the Hugging Face hub and back: subspaces, adapters and projected models, each with a card that says what it is."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, LocalTokenNotFoundError

from spd_lens.errors import SPDError, one_line
from spd_lens.files import filling, is_free, read_json, write_json
from spd_lens.output import markdown, visible
from spd_lens.stats import Finding, Grade
from spd_lens.subspaces.findings import adapter_grade, beside
from spd_lens.subspaces.lora import ORIGIN
from spd_lens.subspaces.signing import SIGNATURE, check_signature, sign
from spd_lens.subspaces.subspace import Subspace

SUBSPACE = "subspace.safetensors"
"""The name of a subspace's file in its repository."""
_READ = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
"""What is taken from a repository, and sent to one: no pickled weights and no code."""
_TRAINED = "training.json"
LICENCES = {
    "gsm8k": "MIT", "svamp": "MIT", "mbpp": "CC BY 4.0", "mmlu": "MIT", "bbh": "MIT", "codealpaca": "CC BY-NC 4.0",
}  # fmt: skip
"""The licences under which the published benchmarks were published."""


def push_to_hub(
    what: Subspace | str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    data_licence: str | None = None,
    private: bool = False,
    revision: str | None = None,
    sign_key: str | Path | None = None,
) -> str:
    """Publish a subspace, an adapter or a whole checkpoint on the hub, with a card made from what is known of it.

    Nothing is sent but safetensors, JSON, the tokenizer's files and the card; paths of this machine are taken out.
    The server is that of `HF_ENDPOINT`, the token that of `hf auth login` or `HF_TOKEN`.

    Args:
        what: A subspace or its file, an adapter's directory (trained, or written by `to_lora`), or a checkpoint's
            directory (as `fold_to` writes it).
        repo_id: `owner/name`; the repository is made if it is not there.
        base_model: The hub name of the model that it belongs to; None: what its files say, if that is a hub name.
        licence: Licence of what is published, as the hub abbreviates it (`apache-2.0`); None: the card names none.
        data_licence: Licence of the data that it was made from; None: that of a published benchmark, else unknown.
        private: Whether a new repository is private.
        revision: The branch; None: the main one.
        sign_key: A private key on an elliptic curve (PEM), with which all of it is signed; None: no signature.

    Returns:
        The address of the commit.

    Raises:
        SPDError: there is no such thing; an adapter names its base by a path of this machine; the key is none; or the
            hub refuses.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = what.save(folder / SUBSPACE) if isinstance(what, Subspace) else Path(what)
        _stage(path, folder, repo_id, base_model, licence, data_licence)
        if sign_key is not None:
            sign(folder, _taken(folder), sign_key)
        try:
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            said = "Published with spd_lens"
            commit = api.upload_folder(folder_path=folder, repo_id=repo_id, revision=revision, commit_message=said)
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, ValueError) as error:
            named = "the subspace" if isinstance(what, Subspace) else path
            raise SPDError(
                f"{named} cannot be published as {repo_id!r}: {one_line(error, 300)}; check the name, and log in with "
                "'hf auth login' or HF_TOKEN"
            ) from error
    return str(commit.commit_url)


def from_hub(repo_id: str, *, revision: str | None = None, key: str | Path | None = None) -> Path:
    """The local copy of a repository of the hub: of a subspace the file, of an adapter or a model the directory.

    `load`, `evaluate(adapter=...)` and `Subspace.load` take it. No pickled weights and no code are fetched.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; None: the newest.
        key: The publisher's public key (PEM): what is not signed with its private half is refused. None: a signature
            is not looked at.

    Raises:
        SPDError: there is no such repository or revision, the hub is out of reach, it holds none of these, or they are
            not the key's.
    """
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*_READ, SIGNATURE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SPDError(
            f"{repo_id!r}{f' at revision {revision!r}' if revision else ''} cannot be had from the hub: "
            f"{one_line(error, 300)}; check its name and revision"
        ) from error
    check_signature(folder, _taken(folder), key)
    if (folder / SUBSPACE).is_file():
        return folder / SUBSPACE
    if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        return folder
    raise SPDError(f"{repo_id!r} holds no subspace, adapter or model: it has neither {SUBSPACE} nor a configuration")


def copy_from_hub(repo_id: str, out: str | Path, *, revision: str | None = None, key: str | Path | None = None) -> Path:
    """`from_hub` into a file or directory of one's own, which must not be there yet."""
    out = Path(out)
    if not is_free(out):
        raise SPDError(f"{out} is there already; choose another --out")
    found = from_hub(repo_id, revision=revision, key=key)
    if found.is_file():
        return Subspace.load(found).save(out)
    with filling(out) as scratch:
        shutil.copytree(found, scratch, dirs_exist_ok=True)
    return out


def _taken(folder: Path) -> list[str]:
    """Which files of a folder are taken from a repository."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if any(fnmatch(name, pattern) for pattern in _READ)]


def _stage(
    path: Path, folder: Path, repo_id: str, base_model: str | None, licence: str | None, data_licence: str | None
) -> None:
    """What is sent, in a folder of its own: the files, with names of models for paths, and the card."""
    if path.is_file():
        subspace = Subspace.load(path)
        subspace.save(folder / SUBSPACE)
        (folder / "spectrum.svg").write_text(spectrum_svg(subspace), encoding="utf-8")
        base_model = base_model or subspace.provenance.get("model")
        text = list(_of_subspace(subspace, repo_id, data_licence))
    elif any((path / name).is_file() for name in ("adapter_config.json", "config.json")):
        for pattern in _READ:
            for file in path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        base_model = _named_base(folder, base_model, path)
        text = list(_of_directory(path, folder, repo_id, base_model, data_licence))
    else:
        raise SPDError(
            f"{path} is no subspace's file and no directory of an adapter or a model; of a run, publish "
            "RUN/subspace.safetensors or RUN/adapter"
        )
    named = base_model if base_model and "/" in base_model else None
    data = ModelCardData(base_model=named, license=licence, tags=["spd-lens", "self-policy-distillation"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(text) + "\n").save(folder / "README.md")


def _named_base(folder: Path, base_model: str | None, path: Path) -> str | None:
    """The hub name of the base, written where the files had a path of this machine."""
    for name, keys in _NAMES.items():
        file = folder / name
        if not file.is_file():
            continue
        settings = inner = read_json(file)
        for key in keys[:-1]:
            inner = inner.get(key, {})
        found = inner.get(keys[-1])
        if not isinstance(found, str):
            continue
        is_path = Path(found).is_absolute() or found.startswith(".")
        if name == "adapter_config.json" and base_model is None:
            if is_path:
                raise SPDError(
                    f"{path} names its base model by a path of this machine ({found}), with which nobody else can do "
                    "anything; give its hub name (base_model, --base-model OWNER/NAME)"
                )
            base_model = found
        inner[keys[-1]] = base_model or (Path(found).name if is_path else found)
        if name in (ORIGIN, _TRAINED):
            write_json(file, settings)
        else:  # of other programs, which know no fields of ours
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return base_model


_NAMES = {
    "adapter_config.json": ("base_model_name_or_path",), _TRAINED: ("settings", "model"), ORIGIN: ("model",),
    "config.json": ("_name_or_path",),
}  # fmt: skip
"""Where files name the model they belong to; the adapter's own configuration comes first, and decides."""


def _of_subspace(subspace: Subspace, repo_id: str, data_licence: str | None) -> Iterator[str]:
    known = subspace.provenance
    yield f"# Capability subspace `{visible(repo_id)}`"
    yield ""
    of = f" of `{visible(str(known['model']))}`" if "model" in known else ""
    task = f", from the gradients of `{visible(str(known['task']))}`" if "task" in known else ""
    yield f"Directions of keys and values{of}{task}, to look at, to project on and to distil with spd_lens."
    yield ""
    yield from markdown(
        ["site", "blocks", "ranks", "of"],
        [
            [site, len(ranks), "/".join(map(str, ranks)), subspace.bases[site].shape[1]]
            for site, ranks in sorted(subspace.ranks.items())
        ],
    )
    if subspace.singular_values:
        yield from ("", "![Singular values of the gradients, by direction](spectrum.svg)")
    yield from ("", *_effects(subspace.findings, subspace.grade))
    yield from ("", *_data(known, data_licence))
    yield from ("", "## Use", "", "```python", "import spd_lens as spd", "")
    yield f'subspace = spd.Subspace.load(spd.from_hub("{visible(repo_id)}"))'
    yield from ("with spd.projected(pair.lens, subspace):", "    ...", "```")


def _of_directory(
    path: Path, folder: Path, repo_id: str, base_model: str | None, data_licence: str | None
) -> Iterator[str]:
    is_adapter = (folder / "adapter_config.json").is_file()
    yield f"# {'Adapter' if is_adapter else 'Projected or distilled model'} `{visible(repo_id)}`"
    yield ""
    made = read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    of = f" of `{visible(base_model)}`" if base_model else ""
    if made:
        yield (
            f"The projection{of} onto the subspace `{visible(str(made.get('subspace')))}` with strength "
            f"{made.get('strength')}, computed and not trained, for the weights `{visible(str(made.get('weights')))}`."
        )
    else:
        yield f"A model distilled from its own completions{of}, by Self-Policy Distillation with spd_lens."
    yield from ("", *_effects(beside(path), adapter_grade(path)))
    run = path.absolute().parent / SUBSPACE
    known = Subspace.load(run).provenance if run.is_file() and not made else {}
    yield from ("", *_data(known, data_licence))
    load = f'pair = spd.load("{visible(repo_id)}")'
    yield from ("", "## Use", "", "```python", "import spd_lens as spd", "", load, "```")
    auto = "peft.AutoPeftModelForCausalLM" if is_adapter else "transformers.AutoModelForCausalLM"
    yield from ("", f"It is an ordinary checkpoint for `{auto}.from_pretrained` too.")


def _effects(findings: tuple[Finding, ...], grade: Grade) -> Iterator[str]:
    """The grade, and every measured difference with its interval."""
    yield from ("## Evidence", "", f"Grade: **{grade}**. {visible(grade.reasons[-1])}")
    if findings:
        head = ["outcome", "task", "against", "difference [95 %]", "data"]
        rows = [[f.outcome, visible(f.task), visible(f.against), f.difference, f.data] for f in findings]
        yield from ("", *markdown(head, rows))


def _data(known: Mapping[str, Any], licence: str | None) -> Iterator[str]:
    """What it was made from, as far as that is known, and under which licence that is."""
    task = str(known.get("task", ""))
    if licence is None:
        own = "generated by spd_lens, without a licence of others" if task.startswith("synthetic") else "unknown"
        licence = LICENCES.get(task, own)
    yield from ("## Data", "", f"Licence of the data: {visible(licence)}.", "")
    for name, value in known.items():
        inner = value.items() if isinstance(value, Mapping) else [("", value)]
        yield f"- {name}: " + ", ".join(f"{key} `{one}`".strip() for key, one in map(_text, inner))


def _text(item: tuple[str, Any]) -> tuple[str, str]:
    return visible(str(item[0])), visible(str(item[1])).replace("`", "'")


def spectrum_svg(subspace: Subspace, width: int = 640, height: int = 320) -> str:
    """A picture of the singular values of all blocks on a logarithmic axis, each block relative to its largest."""
    lines, low = [], -6.0
    for number, (site, values) in enumerate(sorted(subspace.singular_values.items())):
        hue = int(360 * number / len(subspace.singular_values))
        for block in values:
            known = block[block > 0]
            logs = (known / known[0]).log10().clamp_min(low).tolist() if len(known) else []
            points = " ".join(
                f"{40 + (width - 60) * i / max(1, len(block) - 1):.1f},{20 + (height - 50) * y / low:.1f}"
                for i, y in enumerate(logs)
            )
            title = f"<title>{escape(str(site))}</title>"
            lines.append(f'<polyline fill="none" stroke="hsl({hue} 60% 45%)" points="{points}">{title}</polyline>')
    axis = [f'<text x="4" y="{24 + (height - 50) * y / low:.0f}">1e{y}</text>' for y in range(0, int(low) - 1, -2)]
    said = f'<text x="{width // 2 - 60}" y="{height - 6}">direction of each block</text>'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="11">'
    return "\n".join(
        [frame, f'<rect width="{width}" height="{height}" fill="white"/>', *lines, *axis, said, "</svg>\n"]
    )
