"""Print how the engines of generation compare: speed, tokens of the hooked lens model, and what a kill costs.

    python scripts/engine_table.py SUBSPACE lens twin ray [--prompts 16] [--tokens 48] [--vllm-python PATH] [--url URL]

SUBSPACE is a file of `Subspace.save`, or `none`. Every engine completes the same prompts greedily, in float32. Its
corpus is compared with that of the engine named first. Then a process of its own does the same again, is killed as soon
as a completion is on disk, and the corpus is continued here: it must be the undisturbed one, and hold what was there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import spd_lens as spd
from spd_lens.generation import Corpus
from spd_lens.settings import DEFAULT_MODEL, EngineSettings


def make(
    args: argparse.Namespace, engine: str, path: Path, pair: spd.ModelPair | None = None, size: int | None = None
) -> Corpus:
    """The corpus of an engine at `path`, by `size` completions at a time; a process of its own loads the pair."""
    pair = pair or spd.load(args.model, dtype="float32")
    places = {
        "vllm": {"engine_python": args.vllm_python},
        "openai": {"engine_url": args.url, "engine_model": args.served},
    }
    settings = EngineSettings(generation_engine=engine, **places.get(engine, {}))
    return spd.generate(
        pair, spd.tasks.get("synthetic-math").train(n=args.prompts, seed=42), engine_settings=settings, path=path,
        subspace=None if args.subspace == "none" else spd.Subspace.load(args.subspace), max_new_tokens=args.tokens,
        temperature=0.0, batch_size=size, progress=False,
    )  # fmt: skip


def killed(args: argparse.Namespace, engine: str, path: Path) -> str:
    """What a process that was killed by `kill -9` left of a corpus."""
    few = max(1, args.prompts // 4)  # else the twin's completions may all end at once
    process = multiprocessing.get_context("spawn").Process(target=make, args=(args, engine, path, None, few))
    process.start()
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n")):
        time.sleep(0.05)
    process.kill()
    process.join()
    return path.read_text()


def row(args: argparse.Namespace, engine: str, pair: spd.ModelPair, folder: Path, first: Corpus | None) -> Corpus:
    """Measure one engine and print its row; return its corpus."""
    start = time.perf_counter()
    corpus = make(args, engine, folder / f"{engine}.jsonl", pair)
    seconds = time.perf_counter() - start
    same = [one.completion_ids == other.completion_ids for one, other in zip(corpus, first or corpus, strict=True)]
    left = killed(args, engine, folder / f"{engine}-killed.jsonl")
    resumed = make(args, engine, folder / f"{engine}-killed.jsonl", pair)
    kept = (folder / f"{engine}-killed.jsonl").read_text().startswith(left[: left.rfind("\n") + 1])
    whole = "yes" if kept and resumed.records == corpus.records else "NO"
    cells = [
        engine, f"{seconds:.1f}", f"{sum(r.n_completion_tokens for r in corpus) / seconds:.1f}",
        f"{sum(same)} of {len(same)}", f"{whole}, from {left.count(chr(10))} of {len(corpus)}",
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)
    return corpus


def parsed(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subspace")
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--vllm-python", help="a Python that has vLLM, for the engine vllm")
    parser.add_argument("--url", help="a server that has the policy, for the engine openai")
    parser.add_argument("--served", help="the name under which that server has it")
    return parser.parse_args(words)


def main() -> None:
    """Print the table as Markdown."""
    args = parsed(sys.argv[1:])
    pair, first = spd.load(args.model, dtype="float32"), None
    print(f"| engine | seconds, start included | tokens/s | same tokens as {args.engines[0]} | resumed after a kill |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for engine in args.engines:
            corpus = row(args, engine, pair, Path(folder), first)
            first = first or corpus


if __name__ == "__main__":
    main()
