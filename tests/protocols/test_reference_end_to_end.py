"""The reference code's protocol from records to scores, written out plainly and compared with `spd.protocol`.

What is here was written from a description of the reference code (github.com/gh540-svg/hahaha, commit e249fec) and
shares nothing with the library but its noise: records become texts, texts ids, ids gradient rows, rows a projector, and
so on to the score. The parts have tests of their own; this one asks whether the chain agrees when it is called as a
user calls it. Everything is float64 (but for tables of rotations in the lens model), so that a token which differs is a
mistake and no rounding.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import spd_lens as spd
from spd_lens.analysis.gain.completions import completions, open_all
from spd_lens.analysis.gain.factorial import grid
from spd_lens.models.drawing import row_uniforms
from spd_lens.runs import fitted
from spd_lens.sandbox import available, passes_tests
from spd_lens.sites import Site
from spd_lens.study.config import StudyConfig
from spd_lens.study.engine import run_study
from spd_lens.subspaces.extract import token_gradients
from tests.conftest import build_tokenizer, randomise
from tests.helpers import norms_in_full_precision, refused, relative_error

PROTOCOL = spd.protocol("reference")

# the records, and the texts that the table makes of them

STORY = "Tom has 12 apples and buys 30 more, été 🍎. "
GSM8K = {
    "train.jsonl": [
        ("How many 🍎 are 12 🍎 and 30 🍎?", "12 + 30 = <<12+30=42>>42 🍎\n#### 42"),
        ("Tom owes 100 dollars,  and 1,000 more. ", "He has -(100 + 1,000) dollars.\n#### -1,100"),
        (STORY * 20 + "How many?", "12 + 30 = 42\n#### 42"),  # beyond 384 tokens
        ("What does <|eos|> say? 7 * 3", "7 * 3 = 21\n#### 21"),
        ("What is 三 + 四?", "A long way: " + "3 + 4 = 7. " * 60 + "\n#### 7"),  # the answer is behind 256 tokens
        ("Sara reads 15 pages a day.\nHow many in 4 days?", "15 * 4 = 60 pages.\n#### 60"),
        ("A baker sells 7 loaves at 3 dollars", "7 * 3 = 21 dollars.\n#### 21"),
        ("Count to 3.5", "1, 2, 3.\n#### 3.5"),
    ],
    "test.jsonl": [
        ("How much is 1,000 + 234?", "1,000 + 234 = 1,234\n#### 1,234"),
        ("How cold is it? été", "5 - 8 = -3\n#### -3"),
        ("No. <|eos|> 2 * 3?", "6\n#### 6"),
    ],
}
MBPP = [
    (
        601,
        "Add two numbers été.",
        "def add(a, b):\n    return a + b",
        ["assert add(2, 3) == 5", "assert add(0, 1) == 1"],
    ),
    (602, "Double.", "def double(a):\r\n    return 2 * a", ["assert double('🍎') == '🍎🍎'"]),
    (511, "Answer 42.", "def f():\n    return 42", ["assert f() == 42 "]),
]
MMLU = [
    ("Which planet is the largest?", "Earth", "Mars", "Jupiter", "Venus", "C"),
    ("Which is été?", "a", "b, c", "🍎", "d", "A"),
    ("7 * 3?", "21", "22", "23", "24", "A"),
]
SUBTASKS = (
    "logical_deduction_three_objects", "date_understanding", "movie_recommendation", "boolean_expressions",
    "causal_judgement", "sports_understanding",
)  # fmt: skip


def question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def mbpp_prompt(text: str, tests: list[str]) -> str:
    shown = "".join(f"{test}\n" for test in tests)
    return f"Instruction: {text}\nYour code should pass these tests:\n{shown}Code:"


def mmlu_prompt(row: tuple[str, ...]) -> str:
    return question(
        "\n".join([row[0], *(f"{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5], strict=True))])
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original files of all six tasks, with few records."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, content: Any) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in content) if name.endswith("l") else json.dumps(content)
        path.write_text(lines, encoding="utf-8")

    for name, rows in GSM8K.items():
        write(f"gsm8k/{name}", [{"question": q, "answer": a} for q, a in rows])
    full = [{"task_id": i, "text": t, "code": c, "test_list": s, "test_setup_code": ""} for i, t, c, s in MBPP]
    write("mbpp/mbpp.jsonl", full)
    tested = [{**row, "task_id": i, "prompt": row["text"], "test_imports": []} for i, row in enumerate(full, start=11)]
    write("mbpp/sanitized-mbpp.json", tested)
    asked = {"Body": "A pen costs 2", "Equation": "( 2 * 3 )", "Answer": 6.0}
    svamp = [{**asked, "ID": f"chal-{n}", "Question": f"And {n}?"} for n in range(10)]
    write("svamp/SVAMP.json", svamp)
    for split in ("dev", "val", "test"):
        path = folder / f"mmlu/{split}/virology_{split}.csv"
        path.parent.mkdir(parents=True)
        path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in MMLU), encoding="utf-8")
    for name in SUBTASKS:
        rows = [{"input": f"{name} {n}?", "target": target} for n, target in enumerate(("(A)", "True", "no") * 17)]
        write(f"bbh/{name}.json", {"examples": rows})
    alpaca = [{"instruction": f"Print {n}.", "input": "not shown", "output": f"print({n})"} for n in range(103)]
    write("codealpaca/code_alpaca_2k.json", alpaca)
    return folder


def test_prompts_of_all_six_tasks(data: Path) -> None:
    options: dict[str, dict[str, Any]] = {"mmlu": {"train_source": "dev+val", "subjects": ["virology"]}}
    made = {name: PROTOCOL.task(name, data, **options.get(name, {})) for name in PROTOCOL.task_options}
    test = {name: [item.prompt for item in task.test(None)] for name, task in made.items()}
    train = {name: [item.prompt for item in made[name].train(None)] for name in ("gsm8k", "mbpp")}
    assert train["gsm8k"] == [question(q) for q, _ in GSM8K["train.jsonl"]]
    assert train["mbpp"] == [mbpp_prompt(t, s) for _, t, _, s in MBPP]
    assert test["gsm8k"] == [question(q) for q, _ in GSM8K["test.jsonl"]]
    assert test["mbpp"] == train["mbpp"]
    assert set(test["svamp"]) < {question(f"A pen costs 2 And {n}?") for n in range(10)}
    assert sorted(test["mmlu"]) == sorted(map(mmlu_prompt, MMLU))
    assert test["bbh"] == [f"{name} {n}?\nAnswer:" for name in SUBTASKS for n in range(50)]
    assert test["codealpaca"] == [f"Instruction: Print {n}.\nCode:" for n in range(3, 103)]


# the model, and the protocol on it


def tokenizer_like(*, bos: bool, pad_is_eos: bool) -> Any:
    """Digits are tokens by themselves, as Qwen has them; and there is a chat template that must not be used."""
    tokenizer = build_tokenizer(chat=True, bos=bos)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, 5, {"bos": False, "pad_is_eos": False}),
    "llama": (LlamaForCausalLM, LlamaConfig, 4, {"bos": True, "pad_is_eos": True}),
}


def saved(name: str, folder: Path) -> Path:
    """A model as `load` reads it."""
    kind, config, n_layers, options = MODELS[name]
    tokenizer = tokenizer_like(**options)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": tokenizer.pad_token_id}
    hf = kind(
        config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=n_layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
            **ends,
        )
    )  # fmt: skip
    randomise(hf, seed=3).generation_config = GenerationConfig(**ends)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("end_to_end"))


@contextmanager
def outputs_of(hf: Any, places: list[tuple[int, str]], function: Any) -> Iterator[None]:
    """Let a function see, and where it returns something replace, what some `k_proj` and `v_proj` give."""
    with ExitStack() as stack:
        for place in places:
            module = getattr(hf.model.layers[place[0]].self_attn, f"{place[1]}_proj")
            hook = lambda _module, _args, output, place=place: function(place, output)  # noqa: E731
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class Plain:
    """The protocol on a Hugging Face model."""

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        self.hf, self.tokenizer = copy.deepcopy(hf), tokenizer
        n = self.hf.config.num_hidden_layers
        self.places = [(block, kind) for block in (n - 1, n // 2) for kind in "kv"]
        self.ids: list[list[int]] = []
        self.scored: list[list[int]] = []
        self.rows: dict[tuple[int, str], list[torch.Tensor]] = {place: [] for place in self.places}

    def calibrate(self, text: str, spans: list[tuple[int, int]]) -> None:
        """Cut at 256 tokens; a token counts if it lies wholly inside a span; a text without one is left out."""
        read = self.tokenizer(text, truncation=True, max_length=256, return_offsets_mapping=True)
        ids, offsets = read["input_ids"], read["offset_mapping"]
        scored = [t for t, (low, high) in enumerate(offsets)
                  if high > low and any(start <= low and high <= end for start, end in spans)]  # fmt: skip
        if not scored:
            return
        kept: dict[tuple[int, str], torch.Tensor] = {}

        def keep(place: tuple[int, str], output: torch.Tensor) -> None:
            output.retain_grad()
            kept[place] = output

        with outputs_of(self.hf, self.places, keep):
            embedded = self.hf.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
            logits = self.hf(inputs_embeds=embedded, use_cache=False).logits[0]
        targets = torch.tensor([ids[t] for t in scored])
        F.cross_entropy(logits[[t - 1 for t in scored]], targets).backward()
        self.ids.append(ids)
        self.scored.append(scored)
        for place, output in kept.items():
            self.rows[place].append(output.grad[0])

    def projector(self, place: tuple[int, str]) -> torch.Tensor:
        """Of all heads together, of half rank."""
        rows = torch.cat(self.rows[place])
        _, _, right = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
        kept = right[: rows.shape[1] // 2]
        return kept.T @ kept

    @torch.no_grad()
    def logits(self, ids: list[int], model: Any = None, *, projected: bool = False) -> torch.Tensor:
        projectors = {place: self.projector(place) for place in self.places} if projected else {}
        hf = model or self.hf
        with outputs_of(hf, list(projectors), lambda place, output: output @ projectors[place]):
            return hf(torch.tensor([ids]), use_cache=False).logits[0]


def sampled(logits: torch.Tensor, noise: float) -> int:
    """Temperature 0.7, top-p 0.9: the inverse of the cumulative distribution, in order of token id."""
    p = (logits / 0.7).softmax(dim=-1)
    order = p.argsort(descending=True)
    before = p[order].cumsum(dim=-1) - p[order]
    p[order[before >= 0.9]] = 0.0
    cumulative = p.cumsum(dim=-1)
    return int((cumulative <= noise * cumulative[-1]).sum())


def calibration_texts(task: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """Text and spans of every calibration example: math from behind `#### `, code the asserts in the prompt."""
    if task == "gsm8k":
        texts = [f"{question(q)} {a}" for q, a in GSM8K["train.jsonl"]]
        return [(text, [(text.rindex("#### ") + 5, len(text))]) for text in texts]
    found = []
    for _, prompt, code, tests in MBPP:
        text = mbpp_prompt(prompt, tests)
        places = [text.index(test) for test in tests]
        spans = [(place, place + len(test)) for place, test in zip(places, tests, strict=True)]
        found.append((f"{text} {code}", spans))
    return found


@pytest.fixture(scope="module")
def full_precision() -> Iterator[None]:
    with norms_in_full_precision():
        yield


@pytest.fixture(scope="module", params=["gsm8k", "mbpp"])
def both(request: pytest.FixtureRequest, model: Path, data: Path, full_precision: None) -> SimpleNamespace:
    """The plain chain and the library's, up to the corpus, on one source."""
    name = request.param
    pair = spd.load(str(model), dtype="float64", device="cpu", **PROTOCOL.load_options)
    task = fitted(PROTOCOL.task(name, data), pair, spd.SPDConfig.make({"protocol": "reference", "task": name}))
    plain = Plain(pair.hf, pair.tokenizer)
    for text, spans in calibration_texts(name):
        plain.calibrate(text, spans)
    for weight in plain.hf.parameters():
        weight.requires_grad_(False)
    calibration, prompts = task.calibration(len(calibration_texts(name))), task.train(None)
    moments = spd.extract(pair, calibration, settings=PROTOCOL.extraction, progress=False)
    subspace = moments.subspace(**PROTOCOL.subspace_options)
    corpus = spd.generate(pair, prompts, subspace=subspace, settings=PROTOCOL.sampling, progress=False)
    return SimpleNamespace(
        name=name, pair=pair, task=task, plain=plain, calibration=calibration, prompts=prompts, moments=moments,
        subspace=subspace, corpus=corpus,
    )  # fmt: skip


def test_gradient_rows_and_subspace(both: SimpleNamespace) -> None:
    plain = both.plain
    assert len(both.calibration) == len(plain.ids) == {"gsm8k": 6, "mbpp": 3}[both.name]
    rows = token_gradients(both.pair, both.calibration, settings=PROTOCOL.extraction, progress=False)
    for row in rows:
        assert row.encoded.ids == plain.ids[row.index] and row.encoded.scored == plain.scored[row.index]
        for (block, kind), expected in plain.rows.items():
            assert relative_error(row.gradient[Site(block, kind)], expected[row.index]) < 1e-5
    assert set(both.subspace.sites) == {Site(*place) for place in plain.places}
    for place in plain.places:
        (found,) = both.subspace.projector(Site(*place))
        assert both.subspace.ranks[Site(*place)] == (found.shape[0] // 2,)  # one projector for all heads
        assert relative_error(found, plain.projector(place)) < 1e-4


def test_prompts_and_completions(both: SimpleNamespace) -> None:
    """Every token is the one that is drawn, from the plain model under plain hooks, with the noise of its step."""
    plain, differs = both.plain, 0
    for item, record in zip(both.prompts, both.corpus, strict=True):
        ids = plain.tokenizer(item.prompt, truncation=True, max_length=384)["input_ids"]
        assert list(record.prompt_ids) == ids
        new = list(record.completion_ids)
        assert len(new) == 256 or new[-1] == 1
        noise = row_uniforms(42, record.id, 0, 256)
        for projected in (True, False):
            logits = plain.logits(ids + new, projected=projected)[len(ids) - 1 :]
            drawn = [sampled(logits[step], noise[step]) for step in range(len(new))]
            differs += 0 if projected else drawn != new
            assert not projected or drawn == new, record.id
    assert differs > len(both.corpus) / 2, "the projection makes no difference here"
    lengths = [len(record.prompt_ids) for record in both.corpus]
    assert both.name != "gsm8k" or sorted(lengths)[-2:][-1] == 384 > sorted(lengths)[-2]


# training


def training_batch(tokenizer: Any, corpus: Any) -> dict[str, torch.Tensor]:
    """Decoded, tokenised again with the prompt, cut and padded to 256; the padding is in the labels."""
    texts = []
    for record in corpus:
        ids = [id for id in record.prompt_ids if id != 0]  # BOS is put before the text again
        text = [id for id in record.completion_ids if id > 4]  # 0 to 4 are the special tokens
        texts.append(tokenizer.decode(ids + text))
    batch = tokenizer(texts, truncation=True, max_length=256, padding="max_length", padding_side="right",
                      return_tensors="pt")  # fmt: skip
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def losses_of(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each text's mean over all 255 labels."""
    found = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        logits = model(input_ids=ids[None], attention_mask=mask[None], use_cache=False).logits[0]
        found.append(F.cross_entropy(logits[:-1], ids[1:]))
    return found


def rate(step: int, lr: float, warmup: int, steps: int) -> float:
    if step < warmup:
        return lr * step / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class PlainTraining:
    """AdamW on LoRA. Which texts a step takes is the library's to choose: its loss says which they were."""

    def __init__(self, pair: Any, batch: dict[str, torch.Tensor], lr: float) -> None:
        torch.manual_seed(42)  # LoRA's first weights
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        self.model = get_peft_model(copy.deepcopy(pair.hf), LoraConfig(r=8, lora_alpha=8, target_modules=targets))
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        self.batch, self.lr = batch, lr
        self.first = self.state()

    def state(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def step(self, number: int, warmup: int, steps: int, left: set[int], loss: float) -> set[int]:
        """One step on the four of the texts that are left whose loss it is."""
        losses = losses_of(self.model, self.batch)
        means = {four: sum(losses[i].item() for i in four) / len(four)
                 for four in itertools.combinations(sorted(left), min(4, len(left)))}  # fmt: skip
        chosen = min(means, key=lambda four: abs(means[four] - loss))
        assert means[chosen] == pytest.approx(loss, rel=2e-6), number
        self.optimizer.param_groups[0]["lr"] = rate(number, self.lr, warmup, steps)
        self.optimizer.zero_grad()
        (sum(losses[i] for i in chosen) / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        return left - set(chosen)


@pytest.mark.parametrize("lr", [1e-5, 0.3])
def test_training(both: SimpleNamespace, tmp_path: Path, lr: float) -> None:
    """All of it but dropout: texts, padding, losses, learning rates, the epoch it ends with, and its weights."""
    settings = PROTOCOL.training
    assert settings.lora_dropout == 0.05 and settings.lr == 1e-5
    out = spd.finetune(
        both.pair, both.corpus, out=tmp_path / "out", settings=settings, dropout=0.0, lr=lr, progress=False
    )  # fmt: skip
    record = json.loads((out / "training.json").read_text())
    batch = training_batch(both.pair.tokenizer, both.corpus)
    plain = PlainTraining(both.pair, batch, lr)
    n = len(both.corpus)
    per_epoch = math.ceil(n / 4)
    warmup, steps = int(0.5 * per_epoch), 5 * per_epoch
    log = record["log"]
    assert record["n_scored_tokens"] == n * 255
    rates = [rate(step, lr, warmup, steps) for step in range(len(log))]
    assert [entry["learning_rate"] for entry in log] == pytest.approx(rates, abs=1e-15)
    means, ends = [], []
    for epoch in range(len(log) // per_epoch):
        left = set(range(n))
        logged = [entry["loss"] for entry in log[epoch * per_epoch : (epoch + 1) * per_epoch]]
        for place, loss in enumerate(logged):
            left = plain.step(epoch * per_epoch + place, warmup, steps, left, loss)
        assert not left
        means.append(sum(logged) / per_epoch)
        ends.append(plain.state())
        if means[-1] > min(means) and len(means) < len(log) // per_epoch:
            pytest.fail(f"training went on after epoch {epoch + 1}")
    best = means.index(min(means))
    over = len(means) == 5 or best == len(means) - 2
    assert over, means
    assert record["early_stop"]["epoch"] == best + 1
    made = load_file(out / "adapter_model.safetensors")
    for name, end in ends[best].items():
        found = made[name.replace(".default", "")] - plain.first[name]
        assert relative_error(found, end - plain.first[name]) < 5e-3, name
    assert lr < 0.1 or len(means) < 5, "this rate should be too high"


# evaluation


def plain_score(task: str, gold: str, text: str) -> bool:
    """The rules of the table; MBPP's program is run by the caller."""
    if task in ("gsm8k", "svamp"):
        numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""), re.ASCII)
        return bool(numbers) and abs(float(numbers[-1]) - float(gold.replace(",", ""))) <= 1e-4
    if task == "mmlu":
        return next((character for character in text if character in "ABCD"), None) == gold
    if task == "bbh":
        lines = text.strip().splitlines()
        return bool(lines) and lines[0].strip().lower() == gold.lower()
    try:
        compile(text.strip(), "program", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def completions_of(gold: str) -> list[str]:
    return [
        f" {gold}", f" The answer is {gold}.", f" {gold}\nQuestion: Tom has 991 apples. How many?\nAnswer: 990",
        f" {gold},000", f" -{gold}", f" {gold}.00001", f" {gold}.5", "", " ", " no number", f"\n\n {gold} \nor not",
        f" été {gold} 🍎", f"<think>{gold}</think> 7", f" {gold.lower()}", f"```python\nprint({gold!r})\n```",
        f" print({gold!r})\n", " def f(:", f" {gold}<|eos|>",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "mmlu", "bbh", "codealpaca"])
def test_scores_of_given_completions(name: str, data: Path) -> None:
    options = {"train_source": "dev+val", "subjects": ["virology"]} if name == "mmlu" else {}
    task = PROTOCOL.task(name, data, **options)
    found = []
    for item in task.test(3):
        gold = item.completion.rpartition("#### ")[2].strip()
        for text in completions_of(gold):
            found.append(task.score(item, text))
            assert found[-1] == float(plain_score(name, gold, text)), (gold, text)
    assert 0 < sum(found) < len(found)


@pytest.mark.skipif(not available(), reason="no sandbox works here")
def test_scores_of_given_programs(data: Path) -> None:
    task = PROTOCOL.task("mbpp", data, executor=passes_tests)
    with refused("gsm8k runs no programs"):
        PROTOCOL.task("gsm8k", data, executor=passes_tests)
    right = "def add(a, b):\n    return a + b"
    texts = {  # whether its program, by the rules of the table, passes
        f" {right}": True,
        f" {right}\n\nclass Later:\n    def": True,
        f" {right}\nif __name__ == '__main__':\n    x": True,
        f" {right}\n\n\nInstruction: Write a function.\nCode: def add(": True,
        f" {right}\n\nInstruction: Write a function.\nCode: def add(a, b): return 1": False,
        f" Here it is:\n```python\n{right}\n```\nInstruction: Again.\n```python\ndef add(a, b): return 0\n```": True,
        f"```\ndef add(a, b): return 0\n```\n```python\n{right}\n```": False,
        " def add(a, b):\n    return a - b": False,
        "": False,
    }
    item = task.test(1)[0]
    assert {text: bool(task.score(item, text)) for text in texts} == texts


def test_greedy_evaluation_under_all_three_policies(both: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    """Base, projected and trained: the same bare prompts, BOS where training had it, and the same rule."""
    settings = PROTOCOL.training
    adapter = spd.finetune(
        both.pair, both.corpus, out=tmp_path / "adapter", settings=settings, lr=0.01, epochs=1, progress=False
    )  # fmt: skip
    trained = PeftModel.from_pretrained(copy.deepcopy(both.pair.hf), str(adapter)).eval()
    options = {"train_source": "dev+val", "subjects": ["virology"]}
    tasks = {"gsm8k": {}, "mmlu": options, "bbh": {}}
    policies: dict[str, dict[str, Any]] = {"base": {}, "projected": {"subspace": both.subspace},
                                           "trained": {"adapter": adapter}}  # fmt: skip
    seen = {}
    for name, given in tasks.items():
        task = PROTOCOL.task(name, data, **given)
        limit = {"gsm8k": 256, "mmlu": 5, "bbh": 16}[name]
        for policy, how in policies.items():
            path = tmp_path / f"{name}-{policy}.jsonl"
            result = spd.evaluate(both.pair, task, 3, **how, path=path, progress=False)
            records = spd.Corpus.load(path)
            for item, record, found in zip(task.test(3), records, result.items, strict=True):
                ids = both.pair.tokenizer(item.prompt)["input_ids"]
                new = list(record.completion_ids)
                assert list(record.prompt_ids) == ids
                logits = both.plain.logits(
                    ids + new, trained if policy == "trained" else None, projected=policy == "projected"
                )  # fmt: skip
                assert logits[len(ids) - 1 : -1].argmax(dim=-1).tolist() == new
                assert len(new) == limit or new[-1] == 1
                gold = item.completion.rpartition("#### ")[2].strip()
                assert found.score == float(plain_score(name, gold, found.completion))
            seen[name, policy] = [record.completion_ids for record in records]
    said = {policy: [seen[name, policy] for name in tasks] for policy in policies}
    assert len(set(map(str, said.values()))) == 3, "a policy makes no difference here"
    begins = training_batch(both.pair.tokenizer, both.corpus)["input_ids"][:, 0].eq(0)
    assert begins.all() == (ids[0] == 0) and begins.any() == begins.all()


def test_an_example_whose_answer_is_cut_off_is_named(both: SimpleNamespace, data: Path) -> None:
    if both.name == "gsm8k":
        with refused("gsm8k-train-2", "no scored token among its first 256 tokens", "--too-long drop"):
            spd.extract(
                both.pair, PROTOCOL.task("gsm8k", data).calibration(8), settings=PROTOCOL.extraction, progress=False
            )


# a study


def test_a_study_and_where_its_gain_comes_from(data: Path, tmp_path: Path) -> None:
    """All policies are scored by one rule on one set of items, and the analyses read the study as it was made."""
    options = {"max_new_tokens": 6}
    settings = {
        "sources": ["gsm8k"], "targets": ["gsm8k", "bbh"], "n_side_effects": 0, "score_projected": True,
        "task_options": {"gsm8k": options, "bbh": options},
        "settings": {
            "protocol": "reference", "model": str(saved("llama", tmp_path / "model")), "dtype": "float32",
            "device": "cpu", "data_dir": str(data), "n_calibration": 4, "n_train": 4, "n_eval": 3,
            "max_new_tokens": 6, "epochs": 1, "lr": 0.01,
        },
    }  # fmt: skip
    study = run_study(StudyConfig.make(settings), tmp_path / "study", progress=False)
    cells = {cell.method: cell for cell in study.cells()}
    assert list(cells) == ["psr-reference", "ssd-reference", "spd", "spd-random"]
    own, control = cells["spd"].subspace, cells["spd-random"].subspace
    assert set(own.sites) == {Site(block, kind) for block in (3, 2) for kind in "kv"}
    assert own.ranks == control.ranks == dict.fromkeys(own.sites, (8,))  # joint: half of 2 heads of 8
    assert cells["spd"].projection[1] == cells["spd-random"].projection[1] == 1.0
    scored = {("base", "trained"): study.base()}
    scored |= {(name, "trained"): cell for name, cell in cells.items()}
    scored |= {(name, "projected"): cells[name] for name in ("spd", "spd-random")}
    for target, gold in (("gsm8k", ["1,234", "-3", "6"]), ("bbh", ["(A)", "True", "no"])):
        results = [cell.result(target, phase) for (_, phase), cell in scored.items()]
        for result in results:
            assert result.settings["task_options"] == results[0].settings["task_options"]
            assert result.settings["task_options"]["scoring"] == "reference"
            assert [item.prompt for item in result.items] == [item.prompt for item in results[0].items]
            for item, answer in zip(result.items, gold, strict=True):
                assert item.score == float(plain_score(target, answer, item.completion))
    [one] = open_all([study.path], None, False)
    assert {name: (task.scoring, task.bare, task.order) for name, task in one.targets.items()} == dict.fromkeys(
        ("gsm8k", "bbh"), ("reference", True, "file")
    )
    levels = grid([one]).set_index("method")
    assert levels.projection.to_dict() == {"ssd-reference": "none", "spd": "spd", "spd-random": "random"}
    assert set(levels.padding) == {"on"} and set(levels.prompts) == {"verbatim"}
    frame = completions([one])
    table = frame[frame.own].set_index(["target", "method", "item"]).score
    for (method, phase), cell in scored.items():
        if phase == "trained":
            for target in one.targets:
                for item in cell.result(target).items:
                    assert table[target, method, item.id] == item.score
    assert (frame.score == frame[["rest", "format", "stopping"]].sum(axis=1)).all()
