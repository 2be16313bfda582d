"""Run the public surface and store a digest of all that it makes, to show that a refactoring changes nothing.

`python scripts/guard.py before.json` writes `{section/artefact: digest}`. After the change,
`python scripts/guard.py after.json --against before.json` prints every key that differs or that only one of them has,
and ends with exit code 1 if there is any. `--work DIR` keeps what was made, so that two directories can be compared.

Only what a move of modules leaves alone is used: `import spd_lens as spd`, `python -m spd_lens`, and files on disk.
Numbers depend on the processor, the number of threads and the versions of the libraries, so compare on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import spd_lens as spd

torch.set_num_threads(1)

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_SECTIONS = ("extract", "subspace", "algebra", "projected", "folded", "generate", "evaluate", "spans", "check")
COMMANDS = ("", *"run demo study rounds extract generate finetune evaluate spans compare check dashboard".split())
ANALYSES = [
    *"spectra overlap rank-sweep layer-sweep heads directions tokens".split(),
    *"calibration-size corpora sampling-sweep drift tables".split(),
]
VOLATILE = {"seconds", "versions", "machine", "continued_with", "date", "prompt_date", "time", "peak_memory", "files"}
"""Fields that another run of the same code may have otherwise; `files` are checksums of files with seconds in them."""
NOISE = (
    (r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", "UUID"),
    (r"\b20\d\d-\d\d-\d\d([T ][\d:.+]+)?", "DATE"),
    (r"\b\d+(\.\d+)? ?(s|seconds?|minutes?|hours?)\b", "TIME"),
    (r'(?<="Seconds per stage","rows":)\[\[.*?\]\]', "TIME"),
    (r"\b(torch|transformers|transformer-lens|peft|numpy|scipy|python|spd[-_]lens) \d+\.[\w.+]+", "VERSION"),
)

RUNS = {
    "run": "", "run-seed": "--seed 9 --strength 0.5",
    "run-joint": "--joint --rank 3 --center --kinds k,v --engine twin --loss full --seed 7",
    "run-full": "--method full --kinds q,v --layers 0,2 --prompt-format raw --temperature 0.9 --loss-on completion",
}  # fmt: skip
"""Runs that sections share, by name, with their flags."""

found: dict[str, str] = {}
"""What is written in the end: a digest for every key."""


# Digests


def tidy(text: str) -> str:
    """The text without what is not reproducible."""
    text = text.replace(str(Path.cwd()), "WORK")
    for pattern, name in NOISE:
        text = re.sub(pattern, name, text)
    return text


def plain(value: Any) -> Any:
    """A value as JSON with tensors as checksums, numbers in full and without volatile fields."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items() if str(key) not in VOLATILE}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return tidy(str(value))


def store(key: str, value: Any) -> None:
    """Keep the digest of a value under a key of its own."""
    assert key not in found, key
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
    found[key] = hashlib.sha256(text.encode()).hexdigest()[:16]


def store_file(key: str, path: Path) -> None:
    """Digests of a file's content: of tensors and header, of each field of a JSON object, of each column of a table."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            store(f"{key}:tensors", {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
            header = file.metadata() or {}
        store(f"{key}:header", {name: _parsed(text) for name, text in header.items()})
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
        for name, part in content.items() if isinstance(content, dict) else [("", content)]:
            if name not in VOLATILE:
                store(f"{key}:{name}", part)
    elif path.suffix == ".jsonl":
        store(key, [json.loads(line) for line in path.read_text().splitlines()])
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        for name in rows[0] if rows else []:
            store(f"{key}:{name}", [row[name] for row in rows])
        store(f"{key}:text", path.read_text())
    elif path.suffix in (".md", ".yaml", ".html", ".jinja", ".txt", ""):
        store(key, path.read_text())
    else:
        found[key] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def store_folder(section: str, folder: str | Path) -> None:
    """Digests of every file in a folder; pages go to a section of their own."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.name.endswith(".lock"):
            inside = path.relative_to(folder).as_posix()
            store_file(f"pages/{section}/{inside}" if path.suffix == ".html" else f"{section}/{inside}", path)


def call(*arguments: Any) -> tuple[int, str, str]:
    """`python -m spd_lens ...` in this process: exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    earlier, sys.argv = sys.argv, ["spd-lens", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            runpy.run_module("spd_lens", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = earlier
    return code, out.getvalue(), err.getvalue()


def work(key: str, *arguments: Any) -> None:
    """A command that must succeed; what it prints is kept."""
    code, out, err = call(*arguments)
    if code:
        raise RuntimeError(f"spd-lens {' '.join(map(str, arguments))} ended with {code}: {err[-2000:]}")
    store(f"{key}/stdout", out)


# Models, settings and what several sections share


def tiny_model(name: str, *, chat: bool) -> Path:
    """A random model of 4 layers with 4 query and 2 key/value heads, the same on every call, as a directory."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials, alphabet = ["<|bos|>", "<|eos|>", "<|pad|>", "<|start|>", "<|end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    texts = ["How many apples does Tom have now? 12 + 30 = 42. The answer is 42.", "A baker sells 7 loaves. #### 21"]
    core.train_from_iterator(texts, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if not chat:
        steps.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]))
    core.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
        )
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**shape, **ids)) if chat else LlamaForCausalLM(LlamaConfig(**shape, **ids))
    generator = torch.Generator().manual_seed(1 if chat else 0)
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in weight else 0.25 * noise)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    return Path(name)


class Subject:
    """The model under guard, with what several sections need made once."""

    def __init__(self, model: str) -> None:
        self.tiny = model == "tiny"
        if self.tiny:
            tiny_model("tiny_raw", chat=False)
            tiny_model("tiny_chat", chat=True)
        self.model = "./tiny_raw" if self.tiny else SMOLLM2
        self.n, self.limit = (6, 8) if self.tiny else (2, 6)
        self.flags = ["--model", self.model, "--dtype", "float32", "--device", "cpu"]
        self.data = ["--task", "synthetic-math", "--task-option", f"max_new_tokens={self.limit}"]
        self.quick = [
            *self.flags, *self.data, "--n-calibration", 6, "--n-train", 8, "--n-eval", 8, "--n-compared", 4,
            "--n-random", 2, "--max-new-tokens", 8, "--generation-batch-size", 4, "--train-batch-size", 4,
            "--epochs", 2, "--lr", 0.01, "--policies", "base,projected,spd", "--quiet",
        ]  # fmt: skip

    def load(self, model: str | None = None) -> Any:
        return spd.load(model or self.model, dtype="float32", device="cpu")

    @cache  # noqa: B019 - there is one subject, for as long as the script runs
    def pair(self) -> Any:
        return self.load()

    @cache  # noqa: B019
    def chat(self) -> Any:
        return self.load("./tiny_chat")

    @cache  # noqa: B019
    def moments(self) -> Any:
        return spd.extract(self.pair(), self.examples(), kinds=("k", "v"), progress=False)

    @cache  # noqa: B019
    def run(self, name: str = "run") -> Path:
        work(name, "run", *self.quick, "--out", name, *RUNS[name].split())
        return Path(name)

    @cache  # noqa: B019
    def study(self) -> Path:
        settings = {
            "model": self.model, "dtype": "float32", "device": "cpu", "n_calibration": 4, "n_train": 4, "n_eval": 4,
            "max_new_tokens": 8, "generation_batch_size": 4, "train_batch_size": 4, "epochs": 1, "lr": 0.01,
        }  # fmt: skip
        study = {
            "methods": ["base", "spd", "spd-random"], "sources": ["synthetic-math"], "targets": ["synthetic-math"],
            "seeds": [1, 2], "n_forced": 4, "n_side_effects": 2, "settings": settings,
            "task_options": {"synthetic-math": {"max_new_tokens": 8}},
        }  # fmt: skip
        Path("study.yaml").write_text(json.dumps(study))
        work("study", "study", "study.yaml", "--out", "study", "--quiet")
        return Path("study")

    def examples(self) -> Any:
        return spd.tasks.get("synthetic-math").calibration(n=self.n, seed=42)

    def prompts(self) -> Any:
        return spd.tasks.get("synthetic-math").train(n=self.n, seed=42)


# Sections


def extract(subject: Subject) -> None:
    """Moments by loss, engine, layers and kind, from Python and from the command line."""
    for loss in ("aligned", "full"):
        for engine in ("lens", "twin"):
            moments = spd.extract(
                subject.pair(), subject.examples(), kinds=("k", "v", "q"), loss=loss, engine=engine, progress=False
            )
            store_file(f"extract/{loss}-{engine}", moments.save(f"extract-{loss}-{engine}.safetensors"))
            values = [moments.singular_values(site) for site in moments.sites]
            store(f"extract/{loss}-{engine}/values", [moments, moments.mean_loss, values])
    if subject.tiny:
        examples = subject.examples()
        for kind in ("z", "resid"):
            moments = spd.extract(subject.chat(), examples, layers="all", kinds=kind, shards=2, progress=False)
            store_file(f"extract/chat-{kind}", moments.save(f"extract-{kind}.safetensors"))
        work("extract/cli", "extract", *subject.flags, *subject.data, "--n-calibration", 6, "--out", "x", "--quiet")
        store_folder("extract/cli", "x")


def subspaces(subject: Subject) -> dict[str, Any]:
    """Subspaces of every form."""
    moments = subject.moments()
    half, other = moments.halves()
    forms = {
        "half": moments.subspace(0.5), "integer": moments.subspace(2), "joint": moments.subspace(3, per_head=False),
        "centred": moments.subspace(0.25, center=True), "activation": moments.subspace(2, of="activation"),
        "sum": (half + other).subspace(4), "site": moments.subspace(2, sites=moments.sites[-1:]),
    }  # fmt: skip
    return forms | {"cut": forms["half"][:2], "truncated": forms["half"].truncate(0.125)}


def subspace(subject: Subject) -> None:
    """Files and projectors of subspaces of every form, and one read back."""
    for name, made in subspaces(subject).items():
        path = made.save(f"subspace-{name}.safetensors")
        store_file(f"subspace/{name}", path)
        read = spd.Subspace.load(path)
        store(f"subspace/{name}/values", [[read], *([read.projector(s), read.affine(s)] for s in read.sites)])


def algebra(subject: Subject) -> None:
    """Random subspaces, complement, union and intersection."""
    first, second = subject.moments().subspace(0.5), subject.moments().subspace(0.75)
    made = {
        "random": first.random_like(3), "complement": ~first, "union": first | first.random_like(1),
        "intersection": first & second, "selected": first.select(first.sites[:1]),
    }  # fmt: skip
    for name, one in made.items():
        store_file(f"algebra/{name}", one.save(f"algebra-{name}.safetensors"))


def projected(subject: Subject) -> None:
    """Logits of the lens model under the projection, at two strengths, and firings."""
    lens = subject.pair().lens
    text = "Tom has 12 apples and buys 30 more."
    with torch.no_grad():
        store("projected/base", lens(text))
        for name, one in subspaces(subject).items():
            for strength in (1.0, 0.5):
                with spd.projected(lens, one, strength) as projection:
                    store(f"projected/{name}-{strength}", lens(text))
                store(f"projected/{name}-{strength}/firings", projection)


def folded(subject: Subject) -> None:
    """Weights and logits of the twin with the projection folded in, and checkpoints of it."""
    hf, ids = subject.pair().hf, torch.tensor([[0, 5, 9, 77, 31]])
    changed = re.compile(r"\.[kv]_proj\.")
    for name, one in subspaces(subject).items():
        with spd.folded(hf, one), torch.no_grad():
            store(f"folded/{name}/weights", {k: v for k, v in hf.state_dict().items() if changed.search(k)})
            store(f"folded/{name}/logits", hf(ids).logits)
    store("folded/after", dict(hf.state_dict()))
    if subject.tiny:
        half = subspaces(subject)["half"]
        store_folder("fold_to/half", spd.fold_to(hf, half, "fold", tokenizer=subject.pair().tokenizer))
        chat = subject.chat()
        centred = spd.extract(chat, subject.examples(), progress=False).subspace(2, center=True)
        store_folder("fold_to/centred", spd.fold_to(chat.hf, centred, "fold-centred", 0.5))


def generate(subject: Subject) -> None:
    """Corpora with and without projection, raw and chat, by both engines, chosen by prompt, several samples each."""
    half = subject.moments().subspace(0.5)
    prompts = subject.prompts()
    forms: dict[str, dict[str, Any]] = {
        "base": {}, "projected": {"subspace": half}, "lens": {"subspace": half, "engine": "lens"},
        "greedy": {"temperature": 0.0, "subspace": half, "strength": 0.5},
        "samples": {"samples_per_prompt": 3, "top_k": 20},
        "by-id": {"subspace": {p.id: half if i % 2 else None for i, p in enumerate(prompts)}},
        "by-function": {"subspace": lambda example: half if "a" in example.prompt[:40] else None, "top_p": 0.8},
    }  # fmt: skip
    for name, options in forms.items():
        spd.generate(
            subject.pair(), prompts, max_new_tokens=subject.limit, batch_size=4, progress=False,
            path=f"generate/{name}.jsonl", **options,
        )  # fmt: skip
    if subject.tiny:
        spd.generate(subject.chat(), prompts, max_new_tokens=8, progress=False, path="generate/chat.jsonl")
        file = half.save("half.safetensors")
        work("generate/cli", "generate", *subject.flags, *subject.data, "--n-train", 4, "--max-new-tokens", 4,
             "--subspace", file, "--out", "generate/cli.jsonl", "--quiet")  # fmt: skip
    store_folder("generate", "generate")


def finetune(subject: Subject) -> None:
    """A LoRA adapter and a full fine-tuning, the command, and the models brought into step by `sync`."""
    pair = subject.load()
    corpus = spd.generate(pair, subject.prompts(), max_new_tokens=8, progress=False, path="tune.jsonl")
    common: dict[str, Any] = {"epochs": 2, "lr": 0.01, "batch_size": 4, "progress": False}
    store_folder("finetune/lora", spd.finetune(pair, corpus, out="lora", **common))
    full = spd.finetune(pair, corpus, out="full", method="full", loss_on="completion", **common)
    store_folder("finetune/full", full)
    work("finetune/cli", "finetune", *subject.flags, "--corpus", "tune.jsonl", "--epochs", 1, "--out", "lora-cli",
         "--quiet")  # fmt: skip
    store_folder("finetune/cli", "lora-cli")
    text = "Tom has 12 apples"
    with torch.no_grad():
        store("sync/adapter", [vars(pair.sync(to="lens", adapter="lora")), pair.lens(text)])
        store("sync/back", [vars(pair.sync(to="lens")), pair.lens(text)])
        edited = next(p for name, p in pair.lens.named_parameters() if ".mlp." in name and p.ndim == 2)
        edited.add_(0.03)
        store("sync/twin", [vars(pair.sync(to="twin")), dict(pair.hf.state_dict())])
    store("sync/check", vars(pair.check()))
    pair = subject.pair()
    result = spd.evaluate(pair, "synthetic-math", 4, None, "lora", max_new_tokens=8, progress=False)
    store_file("evaluate/adapter", result.save("adapter.json"))


def evaluate(subject: Subject) -> None:
    """Scores of the base and the projected model, on a task of numbers and on one of choices."""
    half = subject.moments().subspace(0.5)
    for task in ("synthetic-math", "synthetic-qa"):
        for name, one in (("base", None), ("projected", half)):
            result = spd.evaluate(subject.pair(), task, subject.n, one, max_new_tokens=subject.limit, progress=False)
            store_file(f"evaluate/{task}/{name}", result.save(f"evaluate-{task}-{name}.json"))
            store(f"evaluate/{task}/{name}/values", result)
    if subject.tiny:
        work("evaluate/cli", "evaluate", *subject.flags, *subject.data, "--n-eval", 4, "--out", "e.json", "--quiet")
        store_file("evaluate/cli", Path("e.json"))


def run(subject: Subject) -> None:
    """A whole run, once more when it is finished, and what `Run` reads from it."""
    path = subject.run()
    store_folder("run", path)
    work("run-again", "run", *subject.quick, "--out", path)
    read = spd.Run.open(path)
    store("run/values", [read, read.config.to_yaml(), read.moments, read.subspace, read.summary])
    store("run/corpora", [read.corpus, list(read.corpus), read.unprojected, list(read.unprojected)])
    store("run/effects", read.effects("synthetic-math"))
    store("run/result", [read.result("synthetic-math", policy) for policy in ("base", "projected", "spd")])
    for name in ("run-joint", "run-full"):
        store_folder(name, subject.run(name))
    work("run/show-config", "run", "--show-config", *subject.quick)


def study(subject: Subject) -> None:
    """A small study with its report, and the plan of one."""
    store_folder("study", subject.study())
    work("study/plan", "study", "study.yaml", "--dry-run", "--out", "study-2", "--set", "seeds=[1,2,3]")


def rounds(subject: Subject) -> None:
    """Two rounds of SPD."""
    place = ["--model", Path(subject.model).resolve()] if subject.tiny else []
    work("rounds", "rounds", *subject.quick, *place, "--rounds", 2, "--n-held-out", 4, "--kl-budget", 0,
         "--no-stop-on-loss", "--out", "rounds")  # fmt: skip
    store_folder("rounds", "rounds")


def compare(subject: Subject) -> None:
    """Two runs side by side."""
    work("compare", "compare", subject.run(), subject.run("run-seed"), "--out", "compare.md")
    store_file("compare/table", Path("compare.md"))


def spans(subject: Subject) -> None:
    """The audit of spans, printed and as a page, of several tasks."""
    for task in ("synthetic-math", "synthetic-qa"):
        work(f"spans/{task}", "spans", task, "--model", subject.model, "--n", 6, "--html", f"{task}.html")
        store_file(f"pages/spans/{task}", Path(f"{task}.html"))


def check(subject: Subject) -> None:
    """What must hold for a model."""
    options = ["--dtype", "float32", "--device", "cpu", "--json", "--show-tokens", "7 * 3"]
    store("check/json", call("check", subject.model, *options)[:2])


def analyze(subject: Subject) -> None:
    """Every analysis with small options."""
    run, other = Path(shutil.copytree(subject.run(), "analysed")), subject.run("run-seed")  # analyses write into a run
    Path("grid.yaml").write_text("ranks: [1, 4]\nn_items: 4\nn_random: 3\n")
    small = ["--grid", "grid.yaml", "--items", 4, "--random", 3]
    options: dict[str, list[Any]] = {
        "spectra": [run, "--draws", 20, "--all-layers"], "overlap": [run, other, "--permutations", 19, "--draws", 99],
        "rank-sweep": [run, *small], "layer-sweep": [run, *small], "heads": [run, "--n", 2],
        "directions": [run, "--n", 2, "--top", 3, "--n-random", 19], "tokens": [run],
        "calibration-size": [run, "--sizes", "2,4", "--draws", 2, "--items", 3], "corpora": [run, "--n", 2],
        "sampling-sweep": [run, "--temperatures", "0,1.0", "--top-ps", "0.9", "--n", 2, "--samples", 2, "--adapter"],
        "drift": [run, "--items", 3, "--n-random", 2],
    }  # fmt: skip
    for name, given in options.items():
        with attempted(f"analyze/{name}"):
            work(f"analyze/{name}", "analyze", name, *given, "--quiet")
    store_folder("analysis", run / "analysis")
    study = subject.study()
    for table in (1, 2, 3, 4, 5, "figure4"):
        with attempted(f"analyze/tables-{table}"):
            work(f"analyze/tables-{table}", "analyze", "tables", table, study, "--out", "tables", "--quiet")
    work("analyze/corpora-study", "analyze", "corpora", study, "--out", "corpora", "--quiet")
    store_folder("analysis-study/tables", "tables")
    store_folder("analysis-study/corpora", "corpora")


def dashboard(subject: Subject) -> None:
    """The page of two runs."""
    work("dashboard", "dashboard", subject.run(), subject.run("run-seed"), "--out", "d.html")
    store_file("pages/dashboard", Path("d.html"))


def help(_: Subject) -> None:
    """What every command and analysis says of itself, and what the package offers."""
    for command in COMMANDS:
        store(f"help/{command or 'spd-lens'}", call(*command.split(), "--help")[:2])
    for name in ANALYSES:
        store(f"help/analyze-{name}", call("analyze", name, "--help")[:2])
    store("help/analyze", call("analyze")[:2])
    store("help/public", [spd.__all__, spd.tasks.__all__, spd.tasks.names()])


def errors(subject: Subject) -> None:
    """What typical mistakes are answered with: exit code and sentence."""
    faults = (
        "--model no/such", "--model ./nowhere", "--task gsm9k", "--eval-tasks svmap", "--layers 0,4", "--layers top",
        "--kinds k,x", "--rank 0", "--rank 9", "--rank 17 --joint", "--policies base,sdp", "--loss half",
        "--strength 2", "--max-new-tokens 256", "--dtype float8", "--device gpu", "--config no.yaml", "--modle x",
        "--task-option difficulty", "--task-option dificulty=easy", "--task gsm8k --data-dir /no/data",
        "--system Brief.", "--too-long cut",
    )  # fmt: skip
    for flags in faults:
        store(f"errors/run {flags}", _said(call("run", *subject.quick, "--out", "fault", *flags.split())))
    Path("bad.jsonl").write_text("not json\n")
    Path("bad.yaml").write_text("n_trian: 3\n")
    store("errors/adapter", _said(call("evaluate", *subject.flags, *subject.data, "--adapter", "none")))
    store("errors/subspace", _said(call("generate", *subject.flags, *subject.data, "--subspace", "no.safetensors")))
    store("errors/reextract", _said(call("rounds", *subject.quick, "--reextract", "never")))
    for line in (
        "rnu", "finetune --corpus none.jsonl", "finetune --corpus bad.jsonl", "run --config bad.yaml", "compare a b",
        "study", "study bad.yaml", "study --preset none", "analyze nothing", "analyze spectra nowhere",
        "spans none.jsonl", "dashboard nowhere", "rounds --rounds 0", "analyze tables three nowhere",
        "check ./nowhere",
    ):  # fmt: skip
        store(f"errors/{line}", _said(call(*line.split())))
    pair, half = subject.pair(), subject.moments().subspace(0.5)
    attempts: dict[str, Callable[[], Any]] = {
        "no examples": lambda: spd.extract(pair, []), "no prompts": lambda: spd.generate(pair, []),
        "layer": lambda: spd.extract(pair, subject.examples(), layers=[9]), "slice": lambda: half[2:4],
        "engine": lambda: spd.generate(pair, ["x"], engine="gpu"), "site": lambda: half.select([9]),
        "strength": lambda: spd.fold_to(pair.hf, half, "f", 2.0), "rank": lambda: subject.moments().subspace(99),
        "full folder": lambda: spd.fold_to(pair.hf, half, "tiny_raw"), "task": lambda: spd.evaluate(pair, 3),
        "another model": lambda: half.check(subject.chat().hf), "load": lambda: spd.load("./tiny_raw", dtype="x"),
        "file": lambda: spd.GradientMoments.load(half.save("s.safetensors")), "sync": lambda: pair.sync(to="moon"),
        "setting": lambda: spd.SPDConfig.make({"a": 1}), "run": lambda: spd.Run.open("tiny_raw"),
        "tune": lambda: spd.finetune(pair, [], lr=-1.0), "span": lambda: spd.Example("a", "b", [(0, 9)]),
        "get": lambda: spd.tasks.get("none"),
    }  # fmt: skip
    for name, attempt in attempts.items():
        try:
            attempt()
            store(f"errors/python {name}", "none")
        except Exception as error:
            store(f"errors/python {name}", [type(error).__name__, str(error)])


def _said(result: tuple[int, str, str]) -> list[Any]:
    noise = ("Loading weights", "Failed to load")
    return [*result[:2], [line for line in result[2].splitlines() if not any(word in line for word in noise)]]


SECTIONS: dict[str, Callable[[Subject], None]] = {
    one.__name__: one
    for one in (
        extract, subspace, algebra, projected, folded, generate, finetune, evaluate, run, study, rounds, compare, spans,
        check, analyze, dashboard, help, errors,
    )
}  # fmt: skip


@contextlib.contextmanager
def attempted(key: str) -> Iterator[None]:
    """Something that may fail: the failure is kept under a key of its own, and everything else goes on."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        store(f"{key}/FAILED", f"{type(error).__name__}: {error}")
    sys.stderr.write(f"{key}: {time.perf_counter() - start:.0f} s\n")


def main() -> int:
    """Run the sections asked for, write their digests, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of digests to write")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny", help="a random model, or SmolLM2")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--against", type=Path, help="an earlier file, to compare with")
    parser.add_argument("--work", type=Path, help="an empty directory to work in and to keep")
    given = parser.parse_args()
    out, earlier = given.out.resolve(), json.loads(given.against.read_text()) if given.against else None
    chosen = given.only or (SECTIONS if given.model == "tiny" else SMOLLM2_SECTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        place = (given.work or Path(scratch)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        home = Path.cwd()
        os.chdir(place)
        subject = Subject(given.model)
        for name in chosen:
            with attempted(name):
                SECTIONS[name](subject)
            out.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
        os.chdir(home)
    failed = [key for key in found if key.endswith("/FAILED")]
    if earlier is None:
        print(f"{len(found)} digests in {out}; failed: {failed or 'none'}")
        return bool(failed)
    keys = sorted(earlier.keys() | found.keys())
    if given.only:
        keys = [key for key in keys if key in found]
    differ = [key for key in keys if earlier.get(key) != found.get(key)]
    for key in differ:
        print("differs:" if key in earlier and key in found else "new:" if key in found else "gone:", key)
    print(f"{len(keys) - len(differ)} of {len(keys)} digests are equal")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
