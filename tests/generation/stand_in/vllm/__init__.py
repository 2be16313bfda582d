"""As much of vLLM as its worker process uses, over transformers, one request after the other and greedy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

__version__ = "0.0-stand-in"


@dataclass
class EngineArgs:
    model: str
    dtype: str
    max_model_len: int
    tensor_parallel_size: int
    skip_tokenizer_init: bool
    generation_config: str
    enforce_eager: bool


@dataclass
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]
    detokenize: bool
    seed: int


class LLMEngine:
    def __init__(self, args: EngineArgs) -> None:
        from transformers import AutoModelForCausalLM

        print("vLLM itself prints what is no answer")
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
        self.waiting: list[tuple[str, list[int], SamplingParams]] = []

    from_engine_args = classmethod(lambda cls, args: cls(args))

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams) -> None:
        self.waiting.append((request_id, prompt["prompt_token_ids"], params))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        import torch

        if len(self.waiting) == int(os.environ.get("STAND_IN_DIES_WITH", -1)):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        request_id, prompt, params = self.waiting.pop()  # in another order than they came
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(params.max_tokens):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in params.stop_token_ids:
                    break
        done = SimpleNamespace(request_id=request_id, finished=True, outputs=[])
        done.outputs.append(SimpleNamespace(token_ids=ids[len(prompt) :]))
        return [done]
