"""lm-eval scores a folded checkpoint and an adapter as docs/lm-eval.md says: its commands, task files and code, run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import spd_lens as spd
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import greedy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'spd-lens[evals]'"
)

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "lm-eval.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the guide calls its model. In the tests a directory of this name holds a tiny one."""
N_ITEMS = 10
N_NEW = 6
TOLERANCE = 1e-3
"""Nats. Batches and padding change float32 sums by less, a lost projection or adapter by far more."""


def block(language: str, *words: str) -> str:
    """The one code block of the guide in this language that holds all of `words`."""
    (found,) = (
        text
        for text in re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
        if all(word in text for word in words)
    )
    return found


EXPORT = block("python", "json.dumps")
FOLD = block("python", "fold_to")
MERGE = block("python", "merged")
TASKS = {name: block("yaml", f"task: {name}\n") for name in ("my_choices", "my_numbers")}
COMMANDS = {name: block("bash", "lm-eval run", f"scores/{name} ") for name in ("projected", "tuned")}


@dataclass
class Plain:
    """Scores of one model computed with transformers alone: one sequence at a time, no padding, no cache."""

    model: Any
    tokenizer: Any
    chat: bool

    def head(self, prompt: str) -> str:
        if not self.chat:
            return f"{prompt}\n"
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def log_likelihood(self, prompt: str, choice: str) -> float:
        """Of the choice and of the white space in front of it, which lm-eval counts too."""
        head = self.head(prompt)
        tokens = self.tokenizer(head + choice, add_special_tokens=not self.chat, return_offsets_mapping=True)
        ids = tokens["input_ids"]
        with torch.no_grad():
            log_p = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(head.rstrip())
        counted = [t for t, (low, _) in enumerate(tokens["offset_mapping"]) if t and low >= start]
        assert "".join(self.tokenizer.decode([ids[t]]) for t in counted) == (head + choice)[start:]
        return sum(log_p[t - 1, ids[t]].item() for t in counted)

    def completion(self, prompt: str) -> str:
        ids = self.tokenizer(self.head(prompt), add_special_tokens=not self.chat)["input_ids"]
        assert len(ids) + N_NEW <= self.model.config.max_position_embeddings
        new = greedy(lambda tokens: self.model(tokens).logits, ids, N_NEW)
        end = new.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in new else N_NEW
        return self.tokenizer.decode(new[:end], skip_special_tokens=True)


@dataclass
class Place:
    """A working directory as the guide's reader has it."""

    directory: Path
    chat: bool

    @classmethod
    def make(cls, directory: Path, checkpoint: Path, *, chat: bool, monkeypatch: pytest.MonkeyPatch) -> Place:
        """With the model, the guide's items (fewer) and its task files (short completions, any text as the answer)."""
        directory.mkdir()
        monkeypatch.chdir(directory)
        shutil.copytree(checkpoint, directory / MODEL)
        exec(EXPORT.replace("test(100,", f"test({N_ITEMS},"), {})
        choices, numbers = (yaml.safe_load(TASKS[name]) for name in ("my_choices", "my_numbers"))
        numbers["generation_kwargs"]["max_gen_toks"] = N_NEW
        numbers["filter_list"][0]["filter"][0]["regex_pattern"] = "(?s)(.+)"
        if not chat:  # as the guide says
            numbers["doc_to_text"] += "\n"
        for task in (choices, numbers):
            (directory / "lm_tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
        return cls(directory, chat)

    def items(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.directory / f"lm_tasks/{name}.jsonl").read_text().splitlines()]

    def make_some_answers_right(self, texts: list[str]) -> list[bool]:
        """Every other item gets as its answer what the model writes; random weights would never be right."""
        items = self.items("numbers")
        for item, text in list(zip(items, texts, strict=True))[::2]:
            item["answer"] = text.strip()
        (self.directory / "lm_tasks/numbers.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
        return [item["answer"] == text.strip() for item, text in zip(items, texts, strict=True)]

    def run(self, command: str) -> Scored:
        """The command as it stands, on the CPU and offline."""
        program, *arguments = shlex.split(command)
        assert program == "lm-eval"
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.directory / "hub")}
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", *arguments, "--device", "cpu"],
            cwd=self.directory,
            env=os.environ | offline | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (results,) = self.directory.glob("scores/*/*/results_*.json")
        samples = {}
        for task in TASKS:
            (path,) = self.directory.glob(f"scores/*/*/samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            samples[task] = sorted(rows, key=lambda row: row["doc_id"])
        return Scored(json.loads(results.read_text())["results"], samples)


@dataclass
class Scored:
    """What lm-eval wrote."""

    results: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]]

    @property
    def likelihoods(self) -> torch.Tensor:
        """`[item, choice]`."""
        rows = [[float(answer[0][0]) for answer in row["resps"]] for row in self.samples["my_choices"]]
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def texts(self) -> list[str]:
        return [row["resps"][0][0] for row in self.samples["my_numbers"]]


def likelihoods(plain: Plain, items: list[dict[str, str]]) -> torch.Tensor:
    """`[item, choice]`."""
    choices = yaml.safe_load(TASKS["my_choices"])["doc_to_choice"]
    rows = [[plain.log_likelihood(item["prompt"], choice) for choice in choices] for item in items]
    return torch.tensor(rows, dtype=torch.float64)


def check(place: Place, command: str, plain: Plain, base: Plain) -> Scored:
    """lm-eval gives the plain model's numbers, and these are not the base's."""
    items = place.items("choices")
    prompts = [item["prompt"] for item in place.items("numbers")]
    expected = likelihoods(plain, items)
    texts = [plain.completion(prompt) for prompt in prompts]
    right = place.make_some_answers_right(texts)
    assert 0 < sum(right) < len(right)
    assert (likelihoods(base, items) - expected).abs().median() > 30 * TOLERANCE
    assert [base.completion(prompt) for prompt in prompts] != texts

    scored = place.run(command)
    torch.testing.assert_close(scored.likelihoods, expected, rtol=0, atol=TOLERANCE)
    assert scored.texts == texts
    gold = torch.tensor([ord(item["answer"]) - ord("A") for item in items])
    assert scored.results["my_choices"]["acc,none"] == (expected.argmax(-1) == gold).double().mean().item()
    assert scored.results["my_numbers"]["exact_match,number"] == sum(right) / len(right)
    return scored


def same_choices(scored: Scored, pair: spd.ModelPair, **policy: Any) -> None:
    """`spd-lens evaluate` finds the same choice most likely for every item, and so the same accuracy."""
    own = spd.evaluate(pair, "synthetic-qa", N_ITEMS, seed=42, max_new_tokens=1, progress=False, **policy)
    assert ["ABCD"[best] for best in scored.likelihoods.argmax(-1)] == [item.choice for item in own.items]
    assert [row["acc"] for row in scored.samples["my_choices"]] == [item.choice_score for item in own.items]


@pytest.fixture
def strong_subspace() -> Callable[[spd.ModelPair], Subspace]:
    """Two random directions of eight per head, at K and V of two layers: a projection that no score survives."""

    def _subspace(pair: spd.ModelPair) -> Subspace:
        sites = [spd.Site(layer, kind) for layer in (1, 3) for kind in ("k", "v")]
        template = torch.zeros(2, 8, 8, dtype=torch.float64)
        template[:, :2, :2] = torch.eye(2)
        return Subspace(dict.fromkeys(sites, template), dict.fromkeys(sites, (2, 2))).random_like(0)

    return _subspace


def loaded(directory: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_folded_checkpoint_scores_as_under_folded(tiny_qwen2_dir, strong_subspace, tmp_path, monkeypatch) -> None:
    """Qwen2: biases, chat prompts."""
    place = Place.make(tmp_path / "place", tiny_qwen2_dir, chat=True, monkeypatch=monkeypatch)
    pair = spd.load(MODEL, dtype="float32", device="cpu")
    subspace = strong_subspace(pair)
    (place.directory / "runs/subspace").mkdir(parents=True)
    subspace.save("runs/subspace/subspace.safetensors")
    exec(FOLD, {})
    base = Plain(loaded(MODEL), pair.tokenizer, chat=True)
    file = Plain(loaded("projected-model"), AutoTokenizer.from_pretrained("projected-model"), chat=True)
    scored = check(place, COMMANDS["projected"], file, base)
    with spd.folded(pair.hf, subspace):
        in_memory = likelihoods(Plain(pair.hf, pair.tokenizer, chat=True), place.items("choices"))
    torch.testing.assert_close(scored.likelihoods, in_memory, rtol=0, atol=TOLERANCE)
    same_choices(scored, pair, subspace=subspace)


def tuned(place: Place, prompts: list[str]) -> tuple[spd.ModelPair, Path, Plain, Plain]:
    """An adapter with an effect; and with transformers alone, the model under it and the base."""
    pair = spd.load(MODEL, dtype="float32", device="cpu")
    corpus = spd.generate(pair, prompts, max_new_tokens=8, progress=False)
    adapter = spd.finetune(pair, corpus, out="adapter", lr=0.02, epochs=4, batch_size=2, progress=False)
    model = PeftModel.from_pretrained(loaded(MODEL), adapter).eval()
    plains = (Plain(each, pair.tokenizer, place.chat) for each in (model, loaded(MODEL)))
    return pair, adapter, *plains


def test_adapter_scores_as_in_peft(tiny_llama_dir, tiny_prompts, tmp_path, monkeypatch) -> None:
    """Llama: raw text behind a BOS."""
    place = Place.make(tmp_path / "place", tiny_llama_dir, chat=False, monkeypatch=monkeypatch)
    pair, adapter, model, base = tuned(place, tiny_prompts)
    command = COMMANDS["tuned"].replace("--apply_chat_template ", "")
    assert command != COMMANDS["tuned"]
    scored = check(place, command, model, base)
    same_choices(scored, pair, adapter=adapter)


def test_merged_adapter_scores_as_in_peft_where_tokenizer_and_model_differ_in_size(
    tiny_qwen2_dir, tiny_prompts, tmp_path, monkeypatch
) -> None:
    """With `peft=` lm-eval would resize the vocabulary, and every log-likelihood with it."""
    place = Place.make(tmp_path / "place", tiny_qwen2_dir, chat=True, monkeypatch=monkeypatch)
    pair, adapter, model, base = tuned(place, tiny_prompts)
    assert len(pair.tokenizer) != pair.hf.config.vocab_size
    exec(MERGE, {})
    scored = check(place, COMMANDS["projected"].replace("pretrained=projected-model", "pretrained=merged"), model, base)
    same_choices(scored, pair, adapter=adapter)


def test_the_guides_pattern_finds_the_gold_answers() -> None:
    number, _first = yaml.safe_load(TASKS["my_numbers"])["filter_list"][0]["filter"]
    items = spd.tasks.get("synthetic-math").test(100)
    found = [re.findall(number["regex_pattern"], item.completion)[number["group_select"]] for item in items]
    assert found == [item.meta["answer"] for item in items]
