"""Ask one running server for several capabilities of one model, and compare each answer with the folded twin's.

    python scripts/toggle.py URL MODEL BASE NAME=SUBSPACE [NAME=SUBSPACE ...] [--prompt TEXT] [--tokens N]

URL is that of an OpenAI-compatible server that takes token ids as prompts (vLLM, for instance), BASE the name under
which it serves MODEL itself, and each NAME that under which it serves what `spd-lens export` made of SUBSPACE.
Nothing is started and nothing is written. The exit code is 1 where a token differs from the twin's.
"""

from __future__ import annotations

import argparse
import sys
from itertools import takewhile

import openai

import spd_lens as spd
from spd_lens.output import markdown


def main() -> int:
    """Print a table: each served name, how many of its tokens are the twin's, and its text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("base")
    parser.add_argument("served", nargs="+", metavar="NAME=SUBSPACE")
    parser.add_argument("--prompt", default="Tom has 12 apples and buys 30 more. How many apples does he have?")
    parser.add_argument("--tokens", type=int, default=32)
    asked = parser.parse_args()
    subspaces = dict(pair.split("=", 1) for pair in asked.served)
    pair = spd.load(asked.model, dtype="float32")
    client = openai.OpenAI(base_url=asked.url, api_key="none")
    rows, all_equal = [], True
    for name, file in {asked.base: None, **subspaces}.items():
        subspace = None if file is None else spd.Subspace.load(file)
        expected = spd.generate(
            pair, [asked.prompt], subspace=subspace, temperature=0.0, max_new_tokens=asked.tokens, progress=False
        ).records[0]
        answer = client.completions.create(
            model=name, prompt=list(expected.prompt_ids), temperature=0.0, max_tokens=asked.tokens,
            extra_body={"return_token_ids": True},
        ).choices[0]  # fmt: skip
        pairs = list(zip(answer.token_ids, expected.completion_ids, strict=False))
        equal = len(list(takewhile(lambda both: both[0] == both[1], pairs)))
        all_equal &= equal == len(expected.completion_ids)
        rows.append([name, f"{equal} of {len(expected.completion_ids)}", " ".join(answer.text.split())])
    print("\n".join(markdown(["served", "first tokens that are the twin's", "text"], rows)))
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
