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
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}

import tokenizers
import torch
import transformers
from safetensors import safe_open
from tokenizers import pre_tokenizers, processors

import spd_lens as spd

torch.set_num_threads(1)

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_SECTIONS = ("extract", "subspace", "generate", "evaluate", "spans", "check")
COMMANDS = ("", *"run demo study rounds extract generate finetune evaluate spans compare check dashboard".split())
VOLATILE = {
    "seconds", "versions", "machine", "continued_with", "date", "prompt_date", "time", "peak_memory", "files", "sha256",
    "sum",
}  # fmt: skip
"""Fields that another run of the same code may have otherwise; the last three are checksums, of seconds too."""
NOISE = (
    (r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", "UUID"),
    (r"\b20\d\d-\d\d-\d\d([T ][\d:.+]+)?", "DATE"),
    (r"\b\d+(\.\d+)? ?(s|seconds?|minutes?|hours?)\b", "TIME"),
    (r'(?<="Seconds per stage","rows":)\[\[.*?\]\]', "TIME"),
    (r"\b(torch|transformers|transformer-lens|peft|numpy|scipy|python|spd[-_]lens) \d+\.[\w.+]+", "VERSION"),
)
_STEPS = """
    extract/cli: extract {data} --n-calibration 6 --out x --quiet > extract/cli=x
    generate/cli: generate {data} --n-train 4 --max-new-tokens 4 --subspace half.safetensors --out generate/cli.jsonl
        --quiet > generate=generate
    finetune/cli: finetune {flags} --corpus tune.jsonl --epochs 1 --out lora-cli --quiet > finetune/cli=lora-cli
    evaluate/cli: evaluate {data} --n-eval 4 --out e.json --quiet > evaluate/cli=e.json
    run: run {quick} --out run > run=run
    run-again: run {quick} --out run
    run-seed: run {quick} --out run-seed --seed 9 --strength 0.5
    run-joint: run {quick} --out run-joint --joint --rank 3 --center --kinds k,v --engine twin --loss full --seed 7
        > run-joint=run-joint
    run-full: run {quick} --out run-full --method full --kinds q,v --layers 0,2 --prompt-format raw --temperature 0.9
        --loss-on completion > run-full=run-full
    run/show-config: run --show-config {quick}
    study: study study.yaml --out study --quiet > study=study
    study/plan: study study.yaml --dry-run --out study-2 --set seeds=[1,2,3]
    rounds: rounds {quick} --model {here}/tiny_raw --rounds 2 --n-held-out 4 --kl-budget 0 --no-stop-on-loss
        --out rounds > rounds=rounds
    compare: compare run run-seed --out compare.md > compare/table=compare.md
    spans/synthetic-math: spans synthetic-math --model {model} --n 6 --html synthetic-math.html
        > pages/spans/synthetic-math=synthetic-math.html
    spans/synthetic-qa: spans synthetic-qa --model {model} --n 6 --html synthetic-qa.html
        > pages/spans/synthetic-qa=synthetic-qa.html
    analyze/spectra: analyze spectra analysed --draws 20 --all-layers --quiet
    analyze/overlap: analyze overlap analysed run-seed --permutations 19 --draws 99 --quiet
    analyze/rank-sweep: analyze rank-sweep analysed --grid grid.yaml --items 4 --random 3 --quiet
    analyze/layer-sweep: analyze layer-sweep analysed --grid grid.yaml --items 4 --random 3 --quiet
    analyze/heads: analyze heads analysed --n 2 --quiet
    analyze/directions: analyze directions analysed --n 2 --top 3 --n-random 19 --quiet
    analyze/tokens: analyze tokens analysed --quiet
    analyze/calibration-size: analyze calibration-size analysed --sizes 2,4 --draws 2 --items 3 --quiet
    analyze/corpora: analyze corpora analysed --n 2 --quiet
    analyze/sampling-sweep: analyze sampling-sweep analysed --temperatures 0,1.0 --top-ps 0.9 --n 2 --samples 2
        --adapter --quiet
    analyze/drift: analyze drift analysed --items 3 --n-random 2 --quiet > analysis=analysed/analysis
    analyze/tables-1: analyze tables 1 study --out tables --quiet
    analyze/tables-2: analyze tables 2 study --out tables --quiet
    analyze/tables-3: analyze tables 3 study --out tables --quiet
    analyze/tables-4: analyze tables 4 study --out tables --quiet
    analyze/tables-5: analyze tables 5 study --out tables --quiet
    analyze/tables-figure4: analyze tables figure4 study --out tables --quiet > analysis-study/tables=tables
    analyze/corpora-study: analyze corpora study --out corpora --quiet > analysis-study/corpora=corpora
    dashboard: dashboard run run-seed --out d.html > pages/dashboard=d.html"""
STEPS = dict(step.split(": ", 1) for step in re.split(r"\n    (?! )", _STEPS)[1:])
"""Commands that must succeed, by the key of what they print; behind `>` are the key and the place of what is kept."""
FAULTS = (
    "--model no/such", "--model ./nowhere", "--task gsm9k", "--eval-tasks svmap", "--layers 0,4", "--layers top",
    "--kinds k,x", "--rank 0", "--rank 9", "--rank 17 --joint", "--policies base,sdp", "--loss half", "--strength 2",
    "--max-new-tokens 256", "--dtype float8", "--device gpu", "--config no.yaml", "--modle x",
    "--task-option difficulty", "--task-option dificulty=easy", "--task gsm8k --data-dir /no/data", "--system Brief.",
    "--too-long cut",
)  # fmt: skip
"""Flags of `run` that are mistakes."""
MISTAKES = (
    "rnu", "finetune --corpus none.jsonl", "finetune --corpus bad.jsonl", "run --config bad.yaml", "compare a b",
    "study", "study bad.yaml", "study --preset none", "analyze nothing", "analyze spectra nowhere", "spans none.jsonl",
    "dashboard nowhere", "rounds --rounds 0", "analyze tables three nowhere", "check ./nowhere",
)  # fmt: skip
"""Commands that are mistakes."""

found: dict[str, str] = {}
"""What is written in the end: a digest for every key."""


def plain(value: Any) -> Any:
    """A value as JSON: tensors as checksums, numbers in full, and nothing that is not reproducible."""
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
    text = str(value).replace(str(Path.cwd()), "WORK")
    for pattern, name in NOISE:
        text = re.sub(pattern, name, text)
    return text


def store(key: str, value: Any) -> None:
    """Keep the digest of a value under a key of its own."""
    assert key not in found, key
    text = json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
    found[key] = hashlib.sha256(text.encode()).hexdigest()[:16]


def store_file(key: str, path: Path) -> None:
    """Keep digests of a file: of tensors and header, of each field of a JSON object, of each column of a table."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            store(f"{key}:tensors", {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
            header = file.metadata() or {}
        store(f"{key}:header", {name: json.loads(text) if text[:1] == "{" else text for name, text in header.items()})
    elif path.suffix == ".json":
        content = json.loads(path.read_text())
        for name, part in content.items() if isinstance(content, dict) else [("", content)]:
            if name not in VOLATILE:
                store(f"{key}:{name}", part)
    elif path.suffix == ".jsonl":
        store(key, [json.loads(line) for line in path.read_text().splitlines()])
    else:
        rows = list(csv.DictReader(io.StringIO(path.read_text()))) if path.suffix == ".csv" else []
        for name in rows[0] if rows else []:
            store(f"{key}:{name}", [row[name] for row in rows])
        store(f"{key}:text" if path.suffix == ".csv" else key, path.read_text())


def store_files(key: str, place: str | Path) -> None:
    """Keep digests of a file, or of every file in a folder; pages in a folder go to a section of their own."""
    place = Path(place)
    if place.is_file():
        store_file(key, place)
    for path in sorted(place.rglob("*")):
        if path.is_file() and not path.name.endswith(".lock"):
            inside = f"{key}/{path.relative_to(place).as_posix()}"
            store_file(f"pages/{inside}" if path.suffix == ".html" else inside, path)


def store_saved(key: str, made: Any, suffix: str = ".safetensors") -> Path:
    """Save something and keep digests of its file."""
    path = made.save(key.replace("/", "-") + suffix)
    store_file(key, path)
    return path


def tiny_model(name: str, *, chat: bool) -> None:
    """Write a random model of 4 layers with 4 query and 2 key/value heads, the same on every call, to a directory."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|bos|>", "<|eos|>", "<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    texts = ["How many apples does Tom have now? 12 + 30 = 42. The answer is 42.", "A baker sells 7 loaves. #### 21"]
    core.train_from_iterator(texts, trainer)
    bos = [] if chat else [processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])]
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), *bos])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
        )
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    kind = transformers.Qwen2Config if chat else transformers.LlamaConfig
    config = kind(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, **ids,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1 if chat else 0)
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in weight else 0.25 * noise)
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)


class Subject:
    """The model under guard, with what several sections need made once."""

    def __init__(self, model: str) -> None:
        self.tiny = model == "tiny"
        if self.tiny:
            tiny_model("tiny_raw", chat=False)
            tiny_model("tiny_chat", chat=True)
        self.model = "./tiny_raw" if self.tiny else SMOLLM2
        self.n, self.limit = (6, 8) if self.tiny else (2, 6)
        self.examples = spd.tasks.get("synthetic-math").calibration(n=self.n, seed=42)
        self.prompts = spd.tasks.get("synthetic-math").train(n=self.n, seed=42)
        flags = f"--model {self.model} --dtype float32 --device cpu"
        data = f"{flags} --task synthetic-math --task-option max_new_tokens={self.limit}"
        quick = (
            f"{data} --n-calibration 6 --n-train 8 --n-eval 8 --n-compared 4 --n-random 2 --max-new-tokens 8 "
            "--generation-batch-size 4 --train-batch-size 4 --epochs 2 --lr 0.01 --policies base,projected,spd --quiet"
        )
        self.words = {"model": self.model, "flags": flags, "data": data, "quick": quick, "here": str(Path.cwd())}

    @cached_property
    def pair(self) -> Any:
        return spd.load(self.model, dtype="float32", device="cpu")

    @cached_property
    def chat(self) -> Any:
        return spd.load("./tiny_chat", dtype="float32", device="cpu")

    @cached_property
    def moments(self) -> Any:
        return spd.extract(self.pair, self.examples, kinds=("k", "v"), progress=False)

    @cached_property
    def subspaces(self) -> dict[str, Any]:
        """Subspaces of every form."""
        moments, half = self.moments, self.moments.subspace(0.5)
        one, other = moments.halves()
        return {
            "half": half, "integer": moments.subspace(2), "joint": moments.subspace(3, per_head=False),
            "centred": moments.subspace(0.25, center=True), "activation": moments.subspace(2, of="activation"),
            "sum": (one + other).subspace(4), "site": moments.subspace(2, sites=moments.sites[-1:]),
            "cut": half[:2], "truncated": half.truncate(0.125),
        }  # fmt: skip

    def call(self, line: str) -> list[Any]:
        """Run `python -m spd_lens ...` in this process; its exit code, stdout and stderr."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        earlier, sys.argv = sys.argv, ["spd-lens", *shlex.split(line.format(**self.words))]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                runpy.run_module("spd_lens", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = earlier
        said = [line for line in err.getvalue().splitlines() if not re.search("Loading weights|Failed to load", line)]
        return [code, out.getvalue(), said]

    def step(self, key: str) -> None:
        """Take one of `STEPS`, after those that make the runs and the study that it reads, unless that is done."""
        line, _, kept = STEPS[key].partition("> ")
        for word in {"run", "run-seed", "study"} & {*line.split()[1:]} - {key}:
            self.step(word)
        if f"{key}/stdout" in found:
            return
        with attempted(key):
            code, out, err = self.call(line)
            if code:
                raise RuntimeError(f"spd-lens {line} ended with {code}: {err[-20:]}")
            store(f"{key}/stdout", out)
            if kept:
                store_files(*kept.split("="))


def write_inputs() -> None:
    """Write the files that commands read."""
    study = """
        methods: [base, spd, spd-random]
        sources: [synthetic-math]
        targets: [synthetic-math]
        seeds: [1, 2]
        n_forced: 4
        n_side_effects: 2
        settings: {model: ./tiny_raw, dtype: float32, device: cpu, n_calibration: 4, n_train: 4, n_eval: 4,
            max_new_tokens: 8, generation_batch_size: 4, train_batch_size: 4, epochs: 1, lr: 0.01}
        task_options: {synthetic-math: {max_new_tokens: 8}}"""
    Path("study.yaml").write_text(textwrap.dedent(study))
    Path("grid.yaml").write_text("ranks: [1, 4]\nn_items: 4\nn_random: 3\n")
    Path("bad.jsonl").write_text("not json\n")
    Path("bad.yaml").write_text("n_trian: 3\n")


# What the sections make in Python; their commands are in `STEPS`.


def extract(subject: Subject) -> None:
    """Extract moments by loss, engine, layers and kind."""
    for loss, engine in itertools.product(("aligned", "full"), ("lens", "twin")):
        moments = spd.extract(
            subject.pair, subject.examples, kinds=("k", "v", "q"), loss=loss, engine=engine, progress=False
        )
        store_saved(f"extract/{loss}-{engine}", moments)
        values = [moments.singular_values(site) for site in moments.sites]
        store(f"extract/{loss}-{engine}/values", [moments, moments.mean_loss, values])
    for kind in ("z", "resid") if subject.tiny else ():
        moments = spd.extract(subject.chat, subject.examples, layers="all", kinds=kind, shards=2, progress=False)
        store_saved(f"extract/chat-{kind}", moments)


@torch.no_grad()
def subspace(subject: Subject) -> None:
    """Write subspaces of every form and read them back; hook and fold them in, and count firings."""
    pair, text, ids = subject.pair, "Tom has 12 apples and buys 30 more.", torch.tensor([[0, 5, 9, 77, 31]])
    store("projected/base", pair.lens(text))
    for name, made in subject.subspaces.items():
        read = spd.Subspace.load(store_saved(f"subspace/{name}", made))
        store(f"subspace/{name}/values", [[read], *([read.projector(s), read.affine(s)] for s in read.sites)])
        for strength in (1.0, 0.5):
            with spd.projected(pair.lens, made, strength) as projection:
                store(f"projected/{name}-{strength}", pair.lens(text))
            store(f"projected/{name}-{strength}/firings", projection)
        with spd.folded(pair.hf, made):
            weights = {key: weight for key, weight in pair.hf.state_dict().items() if re.search("[kv]_proj", key)}
            store(f"folded/{name}/weights", weights)
            store(f"folded/{name}/logits", pair.hf(ids).logits)
    store("folded/after", dict(pair.hf.state_dict()))
    half = subject.subspaces["half"]
    algebra = {
        "random": half.random_like(3), "complement": ~half, "union": half | half.random_like(1),
        "intersection": half & subject.moments.subspace(0.75), "selected": half.select(half.sites[:1]),
    }  # fmt: skip
    for name, made in algebra.items():
        store_saved(f"algebra/{name}", made)


def fold(subject: Subject) -> None:
    """Write checkpoints of the twin with a projection folded in."""
    half, chat = subject.subspaces["half"], subject.chat
    store_files("fold_to/half", spd.fold_to(subject.pair.hf, half, "fold", tokenizer=subject.pair.tokenizer))
    centred = spd.extract(chat, subject.examples, progress=False).subspace(2, center=True)
    store_files("fold_to/centred", spd.fold_to(chat.hf, centred, "fold-centred", 0.5))


def generate(subject: Subject) -> None:
    """Write corpora with and without projection, raw and chat, by both engines, chosen by prompt, with samples."""
    half, prompts = subject.subspaces["half"], subject.prompts
    forms: dict[str, dict[str, Any]] = {
        "base": {}, "projected": {"subspace": half}, "lens": {"subspace": half, "engine": "lens"},
        "greedy": {"temperature": 0.0, "subspace": half, "strength": 0.5},
        "samples": {"samples_per_prompt": 3, "top_k": 20},
        "by-id": {"subspace": {p.id: half if i % 2 else None for i, p in enumerate(prompts)}},
        "by-function": {"subspace": lambda example: half if "a" in example.prompt[:40] else None, "top_p": 0.8},
    }  # fmt: skip
    for name, options in forms.items():
        common = {"max_new_tokens": subject.limit, "batch_size": 4, "progress": False, "path": f"generate/{name}.jsonl"}
        spd.generate(subject.pair, prompts, **common, **options)
    if subject.tiny:
        spd.generate(subject.chat, prompts, max_new_tokens=8, progress=False, path="generate/chat.jsonl")
        half.save("half.safetensors")
    else:  # the command is not among this model's steps
        store_files("generate", "generate")


def finetune(subject: Subject) -> None:
    """Train a LoRA adapter and all weights, and bring the models into step by `sync`."""
    pair = spd.load(subject.model, dtype="float32", device="cpu")
    corpus = spd.generate(pair, subject.prompts, max_new_tokens=8, progress=False, path="tune.jsonl")
    common: dict[str, Any] = {"epochs": 2, "lr": 0.01, "batch_size": 4, "progress": False}
    store_files("finetune/lora", spd.finetune(pair, corpus, out="lora", **common))
    full = spd.finetune(pair, corpus, out="full", method="full", loss_on="completion", **common)
    store_files("finetune/full", full)
    with torch.no_grad():
        store("sync/adapter", [vars(pair.sync(to="lens", adapter="lora")), pair.lens("Tom has 12 apples")])
        store("sync/back", [vars(pair.sync(to="lens")), pair.lens("Tom has 12 apples")])
        edited = next(p for name, p in pair.lens.named_parameters() if ".mlp." in name and p.ndim == 2)
        edited.add_(0.03)
        store("sync/twin", [vars(pair.sync(to="twin")), dict(pair.hf.state_dict())])
    store("sync/check", vars(pair.check()))
    result = spd.evaluate(subject.pair, "synthetic-math", 4, None, "lora", max_new_tokens=8, progress=False)
    store_saved("evaluate/adapter", result, ".json")


def evaluate(subject: Subject) -> None:
    """Score the base and the projected model, on a task of numbers and on one of choices."""
    for task in ("synthetic-math", "synthetic-qa"):
        for name, one in (("base", None), ("projected", subject.subspaces["half"])):
            result = spd.evaluate(subject.pair, task, subject.n, one, max_new_tokens=subject.limit, progress=False)
            store_saved(f"evaluate/{task}/{name}", result, ".json")
            store(f"evaluate/{task}/{name}/values", result)


def run(subject: Subject) -> None:
    """Read a run with `Run`."""
    subject.step("run")
    read = spd.Run.open("run")
    store("run/values", [read, read.config.to_yaml(), read.moments, read.subspace, read.summary])
    store("run/corpora", [read.corpus, list(read.corpus), read.unprojected, list(read.unprojected)])
    store("run/effects", read.effects("synthetic-math"))
    store("run/result", [read.result("synthetic-math", policy) for policy in ("base", "projected", "spd")])


def check(subject: Subject) -> None:
    """Check what must hold for a model."""
    store("check/json", subject.call("check {model} --dtype float32 --device cpu --json --show-tokens '7 * 3'")[:2])


def analyze(subject: Subject) -> None:
    """Copy a run, since analyses write into theirs."""
    for key in ("run", "run-seed"):
        subject.step(key)
    shutil.copytree("run", "analysed")


def help(subject: Subject) -> None:
    """Ask every command and analysis what it does, and the package what it offers."""
    for command in COMMANDS:
        store(f"help/{command or 'spd-lens'}", subject.call(f"{command} --help")[:2])
    for name in set(re.findall(r"analyze ([\w-]+)", _STEPS)):
        store(f"help/analyze-{name}", subject.call(f"analyze {name} --help")[:2])
    store("help/analyze", subject.call("analyze")[:2])
    store("help/public", [spd.__all__, spd.tasks.__all__, spd.tasks.names()])


def errors(subject: Subject) -> None:
    """Make typical mistakes, which end with an exit code and a sentence."""
    for flags in FAULTS:
        store(f"errors/run {flags}", subject.call(f"run {{quick}} --out fault {flags}"))
    store("errors/adapter", subject.call("evaluate {data} --adapter none"))
    store("errors/subspace", subject.call("generate {data} --subspace no.safetensors"))
    store("errors/reextract", subject.call("rounds {quick} --reextract never"))
    for line in MISTAKES:
        store(f"errors/{line}", subject.call(line))
    pair, half = subject.pair, subject.subspaces["half"]
    attempts: dict[str, Callable[[], Any]] = {
        "no examples": lambda: spd.extract(pair, []), "no prompts": lambda: spd.generate(pair, []),
        "layer": lambda: spd.extract(pair, subject.examples, layers=[9]), "slice": lambda: half[2:4],
        "engine": lambda: spd.generate(pair, ["x"], engine="gpu"), "site": lambda: half.select([9]),
        "strength": lambda: spd.fold_to(pair.hf, half, "f", 2.0), "rank": lambda: subject.moments.subspace(99),
        "full folder": lambda: spd.fold_to(pair.hf, half, "tiny_raw"), "task": lambda: spd.evaluate(pair, 3),
        "another model": lambda: half.check(subject.chat.hf), "load": lambda: spd.load("./tiny_raw", dtype="x"),
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


PYTHON: dict[str, Callable[[Subject], None]] = {
    one.__name__: one
    for one in (extract, subspace, fold, generate, finetune, evaluate, run, check, analyze, help, errors)
}
SECTIONS = list(dict.fromkeys(re.split("[/-]", key)[0] for key in [*PYTHON, *STEPS]))


@contextlib.contextmanager
def attempted(key: str) -> Iterator[None]:
    """Let something fail: the failure is kept under a key of its own, and everything else goes on."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        store(f"{key}/FAILED", f"{type(error).__name__}: {error}")
    sys.stderr.write(f"{key}: {time.perf_counter() - start:.0f} s\n")


def main() -> int:
    """Run the sections asked for, write their digests, and compare them with earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="The JSON file of digests to write.")
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny", help="A random model, or SmolLM2.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="Run these sections alone.")
    parser.add_argument("--against", type=Path, help="An earlier file, to compare with.")
    parser.add_argument("--work", type=Path, help="An empty directory to work in and to keep.")
    given = parser.parse_args()
    out, earlier = given.out.resolve(), json.loads(given.against.read_text()) if given.against else None
    with tempfile.TemporaryDirectory() as scratch:
        place = (given.work or Path(scratch)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(place):
            write_inputs()
            subject = Subject(given.model)
            for name in given.only or (SECTIONS if subject.tiny else SMOLLM2_SECTIONS):
                with attempted(name):
                    PYTHON.get(name, lambda _: None)(subject)
                for key in STEPS:
                    if re.split("[/-]", key)[0] == name and (subject.tiny or not key.endswith("/cli")):
                        subject.step(key)
                out.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    if earlier is None:
        failed = [key for key in found if key.endswith("/FAILED")]
        print(f"{len(found)} digests in {out}; failed: {failed or 'none'}")
        return bool(failed)
    keys = sorted(found if given.only else earlier.keys() | found.keys())
    differ = [key for key in keys if earlier.get(key) != found.get(key)]
    for key in differ:
        print("differs:" if key in earlier and key in found else "new:" if key in found else "gone:", key)
    print(f"{len(keys) - len(differ)} of {len(keys)} digests are equal")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
