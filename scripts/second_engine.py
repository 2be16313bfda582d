"""Compare the hooked lens model with OpenVINO on the folded checkpoint: two engines that share no code, token by token.

    python scripts/second_engine.py SUBSPACE [--model NAME] [--prompts 8] [--tokens 32]

needs `pip install openvino`. SUBSPACE is a file of `Subspace.save`. The lens model runs the projection as hooks,
through the engine `lens`. `fold_to` writes the projection into a checkpoint, which OpenVINO converts and runs with
kernels of its own. Both decode greedily in float32, and every step runs the whole sequence.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import spd_lens as spd
from spd_lens.generation import Record
from spd_lens.settings import DEFAULT_MODEL


class NextLogits(torch.nn.Module):
    """The logits behind a text, without cache: what OpenVINO can trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """From `[1, pos]` to `[1, d_vocab]`."""
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]


def compiled(checkpoint: Path) -> Any:
    """The checkpoint in OpenVINO, in float32: by default it would round to what the processor multiplies fastest."""
    import openvino

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    graph = openvino.convert_model(NextLogits(model), example_input=torch.ones(1, 9, dtype=torch.long))
    graph.reshape([1, -1])
    return openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def completed(engine: Any, record: Record) -> tuple[int, ...]:
    """As many greedy tokens as the record has."""
    ids = list(record.prompt_ids)
    for _ in record.completion_ids:
        ids.append(int(np.argmax(engine([np.array([ids])])[0])))
    return tuple(ids[len(record.prompt_ids) :])


def main() -> None:
    """Print which prompts were continued by the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subspace")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    pair, subspace = spd.load(args.model, dtype="float32", device="cpu"), spd.Subspace.load(args.subspace)
    prompts = spd.tasks.get("synthetic-math").train(n=args.prompts, seed=42)
    options: dict[str, Any] = {"max_new_tokens": args.tokens, "temperature": 0.0, "progress": False}
    hooked = spd.generate(pair, prompts, subspace=subspace, engine="lens", **options)
    plain = spd.generate(pair, prompts, **options)  # a projection that changes nothing would prove nothing
    with tempfile.TemporaryDirectory() as folder:
        engine = compiled(spd.fold_to(pair.hf, subspace, Path(folder) / "folded"))
        same = 0
        for mine, base in zip(hooked, plain, strict=True):
            found = completed(engine, mine)
            same += found == mine.completion_ids
            agreed = sum(np.cumprod([a == b for a, b in zip(found, mine.completion_ids, strict=True)]))
            changed = "other" if base.completion_ids != mine.completion_ids else "the same"
            print(f"{mine.id}: {agreed} of {len(found)} tokens agree; without projection: {changed}", flush=True)
    print(f"{same} of {len(hooked)} prompts have the same tokens in OpenVINO {importlib.metadata.version('openvino')}")


if __name__ == "__main__":
    main()
