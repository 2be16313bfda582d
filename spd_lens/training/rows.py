"""What training sees of a corpus: token ids and labels of each completion, and batches of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.generation import Corpus, Record, Streamed, stop_tokens
from spd_lens.models import ModelPair, right_pad
from spd_lens.settings import TrainingSettings
from spd_lens.training.loss import IGNORED

log = logging.getLogger(__name__)

Row = dict[str, list[int]]
"""The `input_ids` and `labels` of one completion; where padding is scored also the `attention_mask`."""


def token_rows(
    records: Iterable[Record],
    loss_on: str,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    pad_id: int | None = None,
) -> list[Row]:
    """Completions as training takes them. By default the corpus' own token ids, never tokenised again: EOS is there
    only where the model ended by itself.

    Args:
        records: The completions.
        loss_on: `"all"` scores prompt and completion (Eq. 14), `"completion"` the completion alone.
        tokenizer: Tokenise the text of prompt and completion again, with this; None: keep the ids.
        max_length: Tokens behind which a text is cut; None: none is.
        pad_id: Pad every text to `max_length` with this token, score the padding, and mask it in the attention; None:
            no padding is scored.
    """
    texts: Iterable[tuple[list[int], int]]
    if tokenizer is None:
        texts = (([*record.prompt_ids, *record.completion_ids], len(record.prompt_ids)) for record in records)
    else:
        texts = retokenised(records, tokenizer)
    rows = []
    for whole, start in texts:
        ids = whole[:max_length]
        # nothing predicts the first token: the sum of Eq. 14 starts at t = 2
        start = min(len(ids), max(1, start) if loss_on == "completion" else 1)
        row = {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}
        if pad_id is not None and max_length is not None:
            padding = [pad_id] * (max_length - len(ids))
            row = {name: [*values, *padding] for name, values in row.items()}
            row["attention_mask"] = [1] * len(ids) + [0] * len(padding)
        rows.append(row)
    return rows


def retokenised(records: Iterable[Record], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """The token ids of each completion's text behind its prompt's, and the position at which the completion begins.

    Prompt and completion are decoded as one text, and the tokenizer adds what it adds to any text. Special tokens of
    the prompt are part of its text, as a chat template wrote them; those that the tokenizer would put before the text a
    second time (BOS) are left out. Of the completion no special token is kept, nor what ended it. The first token that
    holds a character of the completion is where it begins.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    example = tokenizer("a", return_special_tokens_mask=True)
    before = example["input_ids"][: example["special_tokens_mask"].index(0)]
    for record in records:
        prompt, completion = list(record.prompt_ids), list(record.completion_ids)
        if prompt[: len(before)] == before:
            prompt = prompt[len(before) :]
        if record.finish_reason == "eos":  # not every token that ends a turn is a special one
            completion = completion[:-1]
        completion = [id for id in completion if id not in special]
        # decoded alone, a completion would lose its first space in some tokenizers, and a character that begins in the
        # prompt in all
        head, text = (
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in (prompt, prompt + completion)
        )
        start = len(os.path.commonprefix([head, text]))
        found = tokenizer(text, return_offsets_mapping=True)
        ids = list(found["input_ids"])
        yield ids, next((at for at, (_, high) in enumerate(found["offset_mapping"]) if high > start), len(ids))


def scored_padding(pair: ModelPair, settings: TrainingSettings) -> int | None:
    """The token that pads training texts where padding is scored; None where it is not.

    Raises:
        SPDError: The tokenizer has no padding token of its own, or `max_length` is beyond the model's context.
    """
    if not settings.loss_on_padding or settings.max_length is None:
        return None
    pad_id = pair.tokenizer.pad_token_id
    n_rows = pair.hf.get_input_embeddings().weight.shape[0]
    if pad_id is None or not 0 <= pad_id < n_rows:
        has = "has none" if pad_id is None else f"has token {pad_id}, which is not in the model's embedding"
        raise SPDError(
            f"loss_on_padding trains on the tokenizer's padding token, and that of {pair.name} {has}; set "
            "pair.tokenizer.pad_token (pad_token in tokenizer_config.json), or leave loss_on_padding out"
        )
    if settings.max_length > pair.n_ctx:
        raise SPDError(
            f"loss_on_padding pads every text to max_length = {settings.max_length} tokens, more than the context of "
            f"{pair.n_ctx} of {pair.name}; lower max_length"
        )
    return int(pad_id)


class LazyRows(Sequence[Row]):
    """Rows that are made of their records whenever they are asked for, as `torch.utils.data` takes a dataset."""

    def __init__(self, records: Sequence[Record], row_of: Callable[[Record], Row]) -> None:
        self._records, self._row_of = records, row_of

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row_of(record) for record in self._records[index]]
        return self._row_of(self._records[index])


def corpus_rows(pair: ModelPair, records: Sequence[Record], settings: TrainingSettings) -> Sequence[Row]:
    """The completions as these settings train on them: all at once, or each in its turn where the corpus is streamed.

    Raises:
        SPDError: As `scored_padding`; or a completion of which nothing is left to train on, or that is beyond the model
            when it is tokenised again.
    """
    pad_id = scored_padding(pair, settings)
    if pad_id is not None and pad_id not in (ends := stop_tokens(pair)):
        pad, *shown = pair.tokenizer.convert_ids_to_tokens([pad_id, *ends])
        log.warning(
            "the padding token %s of %s ends no completion (%s do), so that a loss on padding cannot teach it to stop; "
            "where the published generation_config.json names it (GGUF files have none), add it to "
            "pair.hf.generation_config.eos_token_id",
            pad, pair.name, ", ".join(map(str, shown)) or "none",
        )  # fmt: skip
    made = partial(
        token_rows,
        loss_on=settings.loss_on,
        tokenizer=pair.tokenizer if settings.retokenise else None,
        max_length=settings.max_length,
        pad_id=pad_id,
    )
    streamed = isinstance(records, Corpus) and isinstance(records.records, Streamed)
    rows = LazyRows(records, lambda record: made([record])[0]) if streamed else made(records)
    if not settings.retokenise and settings.max_length is None:
        return rows  # the corpus' own ids, all of them
    n_rows = pair.hf.get_input_embeddings().weight.shape[0]
    for record, row in zip(records, rows, strict=True):
        ids = row["input_ids"]
        if len(ids) > pair.n_ctx or max(ids, default=0) >= n_rows:
            raise SPDError(
                f"the completion of prompt {record.id!r}, tokenised again, does not fit the model: {len(ids)} tokens "
                f"(context {pair.n_ctx}), largest id {max(ids)} (vocabulary {n_rows}); set max_length, or leave "
                "retokenise out"
            )
        if not any(row.get("attention_mask", [True])) or all(label == IGNORED for label in row["labels"]):
            raise SPDError(
                f"nothing of the completion of prompt {record.id!r} is left to train on; raise max_length, train on "
                "the prompt too (loss_on='all'), or leave the prompt out"
            )
    return rows


def collated(rows: Sequence[Row], pad_id: int) -> dict[str, Int[Tensor, "row pos"]]:
    """Rows of unequal length as one batch, padded on the right; this padding is masked and has no loss.

    Rows that bring padding of their own, which is scored, are of one length, and masked where they say.
    """
    tokens, mask = right_pad([row["input_ids"] for row in rows], pad_id, "cpu")
    labels, _ = right_pad([row["labels"] for row in rows], IGNORED, "cpu")
    if "attention_mask" in rows[0]:
        mask = torch.tensor([row["attention_mask"] for row in rows])
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
