"""Training as the reference code does it (github.com/gh540-svg/hahaha, commit e249fec), against the same written out
with torch, PEFT and transformers alone: texts, labels, schedule, loss, steps and the epoch at which it stops.

Prompt and completion are decoded, tokenised again, cut at a number of tokens and padded to it, and padding is in the
labels; AdamW with weight decay 0.01, warm-up over half an epoch, a cosine to 0 over all epochs, gradients clipped to
norm 1; training ends with the first epoch without a lower mean loss, and the best epoch's weights are the result.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from spd_lens.generation.corpus import Corpus, Record
from spd_lens.models.pair import ModelPair
from spd_lens.settings import TrainingSettings
from spd_lens.training.finetune import finetune
from spd_lens.training.loss import IGNORED
from spd_lens.training.rows import collated, corpus_rows
from tests.conftest import CHAT_TEMPLATE, build_llama, build_qwen2, build_tokenizer
from tests.helpers import norms_in_full_precision, relative_error

LENGTH = 256
PROMPT = "Question: Tom has 12 apples.\nAnswer:"
PROTOCOL = {"retokenise": True, "loss_on_padding": True, "warmup_epochs": 0.5, "early_stop": True}


def pair_with(tokenizer, build=build_llama) -> ModelPair:
    twin = build(tokenizer)
    twin.config.max_position_embeddings = 2 * LENGTH  # a corpus may hold texts that are longer than the cut
    return ModelPair(twin, tokenizer, name="tiny")


def tokenizers() -> dict[str, object]:
    """With BOS and without, with a padding token of its own and with EOS for one (as Qwen's base models have it)."""
    ends = build_tokenizer(chat=False, bos=False)
    ends.pad_token = ends.eos_token
    return {"bos": build_tokenizer(chat=False), "no bos": build_tokenizer(chat=False, bos=False), "pad is eos": ends}


def record(tokenizer, prompt: str, completion: list[int], name: str) -> Record:
    ended = completion[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(completion, skip_special_tokens=True)
    ids = tuple(tokenizer(prompt)["input_ids"])
    return Record(name, prompt, text, ids, tuple(completion), "eos" if ended else "length")


def hard_corpus(tokenizer) -> Corpus:
    """Texts at which a mistake shows: what they are called says why."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    eos = tokenizer.eos_token_id
    exact = next(n for n in range(LENGTH) if len(tokenizer(PROMPT + " 7" * n + " Tom")["input_ids"]) == LENGTH)
    completions = {
        "ends by itself": [*ids(" The answer is 42."), eos],
        "nothing but its end": [eos],
        "cut off": ids(" The answer is"),
        "in other scripts": [*ids(" été 価格は €42 🍎🍏"), eos],
        "cut within a character": ids(" 🍎🍏")[:-2],
        # what was sampled is not what the tokenizer makes of it
        "byte by byte": [id for letter in " apples" for id in ids(letter)],
        "an end within": [*ids(" 42."), eos, *ids(" apples"), eos],
        "far too long": ids(" 12 + 30 = 42." * 50),
        "just as long": ids(" 7" * exact + " Tom"),
        "one more": ids(" 7" * exact + " Tom."),
        "an end behind the cut": [*ids(" 7" * exact + " Tom"), eos],
        "spaces": [*ids("   \n\n  "), eos],
    }
    records = [record(tokenizer, PROMPT, each, name) for name, each in completions.items()]
    marked = f"What is {tokenizer.eos_token} for?"
    return Corpus([*records, record(tokenizer, marked, ids(" An end."), "an end in the prompt")])


def reference_batch(tokenizer, corpus: Corpus, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Plain transformers: text and text, cut and padded by the tokenizer, and the ids are the labels."""
    texts = [each.prompt + tokenizer.decode(each.completion_ids, skip_special_tokens=True) for each in corpus]
    batch = tokenizer(
        texts, truncation=True, max_length=length, padding="max_length", padding_side="right", return_tensors="pt"
    )  # fmt: skip
    return {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": batch["input_ids"].clone()}


def ours(pair: ModelPair, corpus: Corpus, **options) -> dict[str, torch.Tensor]:
    settings = TrainingSettings(retokenise=True, **{"max_length": LENGTH, "loss_on_padding": True} | options)
    return collated(corpus_rows(pair, corpus, settings), pair.pad_id)


@pytest.mark.parametrize("name", tokenizers())
def test_texts_labels_and_masks(name):
    tokenizer = tokenizers()[name]
    corpus = hard_corpus(tokenizer)
    found, expected = ours(pair_with(tokenizer), corpus), reference_batch(tokenizer, corpus)
    for row, each in enumerate(corpus):
        assert found["input_ids"][row].tolist() == expected["input_ids"][row].tolist(), each.id
        assert found["attention_mask"][row].tolist() == expected["attention_mask"][row].tolist(), each.id
        assert found["labels"][row, 1:].tolist() == expected["labels"][row, 1:].tolist(), each.id
    assert (found["labels"][:, 0] == IGNORED).all()  # which transformers shifts away
    lengths = {each.id: int(n) for each, n in zip(corpus, found["attention_mask"].sum(1), strict=True)}
    long = ("far too long", "just as long", "one more", "an end behind the cut")
    assert all((n == LENGTH) == (id in long) for id, n in lengths.items())
    by_name = {each.id: row for row, each in enumerate(corpus)}
    byte_by_byte = corpus[by_name["byte by byte"]]
    assert lengths["byte by byte"] < len(byte_by_byte.prompt_ids + byte_by_byte.completion_ids)
    # without padding in the loss: the same texts, and labels on them alone
    short = ours(pair_with(tokenizer), corpus, loss_on_padding=False)
    assert torch.equal(short["attention_mask"], expected["attention_mask"])
    real = expected["attention_mask"].bool()
    assert torch.equal(short["input_ids"][real], expected["input_ids"][real])
    assert torch.equal(short["labels"][:, 1:] != IGNORED, real[:, 1:])


def test_a_chat_prompt_keeps_its_template_and_has_one_bos():
    for bos in (True, False):
        tokenizer = build_tokenizer(chat=True, bos=bos)
        pair = pair_with(tokenizer, build_qwen2)
        turn = [{"role": "user", "content": "7 * 3"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert text.startswith("<|bos|><|start|>user") and CHAT_TEMPLATE.startswith("{{ bos_token }}")
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        answer = tokenizer(" 21", add_special_tokens=False)["input_ids"]
        corpus = Corpus([Record("x", "7 * 3", " 21", ids, (*answer, end), "eos")])
        [row] = corpus_rows(pair, corpus, TrainingSettings(retokenise=True))
        assert row["input_ids"] == tokenizer(f"{text} 21", add_special_tokens=False)["input_ids"]
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_where_the_completion_begins_in_a_text_that_is_tokenised_again():
    tokenizer = build_tokenizer(chat=False)
    pair = pair_with(tokenizer)
    corpus = hard_corpus(tokenizer)
    kept = Corpus([each for each in corpus if each.id not in ("nothing but its end",)])
    rows = corpus_rows(pair, kept, TrainingSettings(retokenise=True, loss_on="completion", max_length=LENGTH))
    for each, row in zip(kept, rows, strict=True):
        scored = [id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        n = len(row["input_ids"]) - len(scored)
        head, tail = tokenizer.decode(row["input_ids"][:n]), tokenizer.decode(scored)
        assert head == tokenizer.bos_token + each.prompt, each.id
        assert each.completion.startswith(tail) and tail, each.id


def closed_form(step: int, lr: float, warmup: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: a line from 0, then half a cosine to 0."""
    if step < warmup:
        return lr * step / warmup
    return lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize(
    ("n", "batch_size", "accumulation", "warmup_epochs", "warmup"),
    [(7, 1, 1, 0.5, 3), (7, 2, 1, 0.5, 2), (7, 2, 3, 0.5, 1), (7, 2, 1, 0.2, 0), (6, 1, 1, 1.25, 7), (3, 1, 1, 0.0, 0)],
)
def test_the_learning_rate_of_every_step(tmp_path, n, batch_size, accumulation, warmup_epochs, warmup):
    tokenizer = build_tokenizer(chat=False)
    corpus = Corpus(hard_corpus(tokenizer).records[:n])
    out = finetune(
        pair_with(tokenizer), corpus, out=tmp_path / "out", lr=1e-3, epochs=2, batch_size=batch_size, progress=False,
        gradient_accumulation=accumulation, warmup_epochs=warmup_epochs, max_length=24,
    )  # fmt: skip
    rates = [entry["learning_rate"] for entry in json.loads((out / "training.json").read_text())["log"]]
    steps = 2 * math.ceil(math.ceil(n / batch_size) / accumulation)
    assert rates == pytest.approx([closed_form(step, 1e-3, warmup, steps) for step in range(steps)], abs=1e-15)


def small_corpus(tokenizer) -> Corpus:
    """Of unequal length, some cut at 24 tokens."""
    kept = ("ends by itself", "nothing but its end", "in other scripts", "far too long", "an end within", "spaces")
    return Corpus([each for each in hard_corpus(tokenizer) if each.id in kept])


def plain_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over all labels of the batch, padding's too: what transformers' own loss is, which rounds to float32."""
    output = model(**batch, use_cache=False)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    return loss


@pytest.mark.parametrize("name", tokenizers())
@pytest.mark.parametrize("build", [build_llama, build_qwen2])
def test_the_loss_of_a_batch(tmp_path, build, name):
    tokenizer = tokenizers()[name]
    pair, corpus = pair_with(tokenizer, build), small_corpus(tokenizer)
    batch = reference_batch(tokenizer, corpus, 40)
    assert 0 < batch["attention_mask"].sum() < batch["attention_mask"].numel()
    with norms_in_full_precision(), torch.no_grad():
        wide = copy.deepcopy(pair.hf).double()
        expected = plain_loss(wide, batch).item()
        unmasked = batch | {"attention_mask": torch.ones_like(batch["labels"])}
        assert abs(plain_loss(wide, unmasked).item() - expected) > 1e-3  # what would be wrong shows
    log = {}
    for batch_size, accumulation in ((6, 1), (2, 3)):
        out = finetune(
            pair, corpus, out=tmp_path / str(batch_size), lr=1e-4, epochs=1, batch_size=batch_size, dropout=0.0,
            gradient_accumulation=accumulation, max_length=40, progress=False, **PROTOCOL | {"warmup_epochs": 0.0},
        )  # fmt: skip
        summary = json.loads((out / "training.json").read_text())
        log[batch_size] = [entry["loss"] for entry in summary["log"]]
        assert summary["n_scored_tokens"] == batch["labels"][:, 1:].numel()
    assert log[6] == pytest.approx([expected], rel=1e-5)
    assert log[2] == pytest.approx([expected], rel=1e-5)


def plain_training(model, batch, lr: float, epochs: int, warmup: int) -> tuple[list[float], list[dict]]:
    """All texts in every step, which is an epoch: the loss of each epoch that there is, and the weights at its end."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr, weight_decay=0.01)
    losses: list[float] = []
    ends: list[dict[str, torch.Tensor]] = []
    for step in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = closed_form(step, lr, warmup, epochs)
        optimizer.zero_grad()
        loss = plain_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        ends.append({name: weight.detach().clone() for name, weight in trained.items()})
        losses.append(loss.item())
        if loss.item() > min(losses):
            break
    return losses, ends


def with_lora(pair: ModelPair) -> torch.nn.Module:
    torch.manual_seed(42)  # the first weights
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return get_peft_model(copy.deepcopy(pair.hf), config).train()


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize(("lr", "warmup_epochs"), [(1e-3, 2.0), (1e-2, 0.5)])
def test_the_weights_after_some_steps(tmp_path, lr, warmup_epochs):
    tokenizer = build_tokenizer(chat=False)
    pair, corpus = pair_with(tokenizer), small_corpus(tokenizer)
    out = finetune(
        pair, corpus, out=tmp_path / "out", lr=lr, epochs=4, batch_size=6, dropout=0.0, max_length=40, progress=False,
        **PROTOCOL | {"warmup_epochs": warmup_epochs, "early_stop": False},
    )  # fmt: skip
    model = with_lora(pair)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    losses, ends = plain_training(model, reference_batch(tokenizer, corpus, 40), lr, 4, int(warmup_epochs))
    assert len(ends) == 4
    log = json.loads((out / "training.json").read_text())["log"]
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    made = adapter_of(out)
    assert len(made) == len(before) == 32
    for name, end in ends[-1].items():
        found = made[name.replace(".default", "")]
        # how far a weight goes, and not what it was, is compared
        assert relative_error(found - before[name], end - before[name]) < 2e-3, name


def test_training_stops_where_the_loss_is_not_lower_and_gives_the_best_epochs_weights(tmp_path):
    tokenizer = build_tokenizer(chat=False)
    pair, corpus, lr, epochs = pair_with(tokenizer), small_corpus(tokenizer), 0.1, 9
    options = {"lr": lr, "epochs": epochs, "batch_size": 6, "dropout": 0.0, "max_length": 40, "progress": False}
    out = finetune(pair, corpus, out=tmp_path / "out", **options, **PROTOCOL)
    model = with_lora(pair)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    losses, ends = plain_training(model, reference_batch(tokenizer, corpus, 40), lr, epochs, 0)
    best = losses.index(min(losses))
    assert 1 <= best == len(losses) - 2 < epochs - 2
    summary = json.loads((out / "training.json").read_text())
    noted = summary["early_stop"]
    assert (noted["epoch"], noted["stopped_early"], summary["n_steps"]) == (best + 1, True, len(losses))
    assert noted["losses"] == pytest.approx(losses, rel=1e-3)
    made = adapter_of(out)
    for name, end in ends[best].items():
        found = made[name.replace(".default", "")] - before[name]
        assert relative_error(found, end - before[name]) < 0.02, name
        assert relative_error(found, ends[best + 1][name] - before[name]) > 0.05, name
