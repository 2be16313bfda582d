"""The process that has vLLM: completes prompts of token ids, one line of JSON each. Run by `vllm.py`, as a script.

It imports nothing of this project, so that vLLM may live in an environment of its own. The first line of its input is
the setup: `model`, the arguments of vLLM's engine, and `sampling`, those of its `SamplingParams`. Every other line is a
request, `{"prompt_ids": [...], "seed": ...}`; the input is read to its end first. The answers come as requests end, as
`{"request": 0, "ids": [...]}` with the request's number. All else that vLLM prints goes to the standard error.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Read requests from the standard input, and write answers to what was the standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.pop(0)  # this folder, in which `vllm` and `ray` are other files
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.platforms import current_platform

    setup = json.loads(sys.stdin.readline())
    # compiling pays on a GPU alone
    engine = LLMEngine.from_engine_args(EngineArgs(**setup["model"], enforce_eager=current_platform.is_cpu()))
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        sampling = SamplingParams(**setup["sampling"], seed=request["seed"])
        engine.add_request(str(number), {"prompt_token_ids": request["prompt_ids"]}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answer = {"request": int(output.request_id), "ids": list(output.outputs[0].token_ids)}
                answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
