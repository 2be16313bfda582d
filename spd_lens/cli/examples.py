"""What is shown under each command's `--help`: lines that work when they are pasted, on files of one's own."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "run": (
        "spd-lens run --task synthetic-math --n-train 16 --out runs/math",
        "spd-lens run --model Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --protocol reference --out runs/gsm8k",
    ),
    "demo": ("spd-lens demo --out runs/demo",),
    "study": ("spd-lens study --preset tiny --out runs/tiny", "spd-lens study --preset tiny --dry-run"),
    "rounds": ("spd-lens rounds --task synthetic-math --rounds 2 --out runs/rounds",),
    "extract": ("spd-lens extract --task synthetic-math --layers last_mid --rank 0.5 --out runs/math-subspace",),
    "generate": (
        "spd-lens generate --task synthetic-math --subspace runs/math-subspace/subspace.safetensors --out corpus.jsonl",
    ),
    "finetune": ("spd-lens finetune --corpus corpus.jsonl --epochs 1 --out adapter",),
    "evaluate": ("spd-lens evaluate --task synthetic-math --adapter adapter --out eval.json",),
    "spans": ("spd-lens spans synthetic-math --show 5", "spd-lens spans own.jsonl --html spans.html"),
    "compare": ("spd-lens compare runs/first runs/second --json",),
    "check": ("spd-lens check HuggingFaceTB/SmolLM2-135M-Instruct",),
    "analyze": ("spd-lens analyze spectra runs/math",),
    "dashboard": ("spd-lens dashboard runs/math --out page.html", "spd-lens dashboard runs/math --serve"),
    "export": ("spd-lens export runs/math/subspace.safetensors --as lora --out math-lora",),
    "push": ("spd-lens push runs/math/subspace.safetensors OWNER/arithmetic --license apache-2.0",),
    "pull": ("spd-lens pull OWNER/arithmetic --out arithmetic.safetensors",),
    "explain": ("spd-lens explain runs/math --show 1",),
    "detect": ("spd-lens detect folded --base HuggingFaceTB/SmolLM2-135M-Instruct --json",),
    "grade": ("spd-lens grade runs/math --json",),
    "verify": ("spd-lens verify runs/math",),
}
"""Examples of each command."""


def epilog(command: str | None) -> str:
    """The examples of a command, each a paragraph of its own."""
    return "\n\n".join(["Examples:", *EXAMPLES[command or ""]])
