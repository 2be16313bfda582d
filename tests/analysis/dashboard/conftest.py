"""Two runs with all that a page can show, hostile text among it, and a real Chromium that is watched."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field

import pandas as pd
import pytest

from spd_lens.analysis.common.subject import Subject
from spd_lens.runs.run_dir import Run

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-component-update "
    "--disable-sync"
).split()
HOSTILE = "</script><img src=x onerror=alert(1)> & <b>bold</b>"
BETA = "b<img src=x onerror=alert(2)>"
"""A directory may be called anything."""


@pytest.fixture(scope="session")
def two_runs(finished_run, tmp_path_factory):
    """`alpha` with saved analyses and hostile text in its corpus, and another whose moments are of half the data."""
    root = tmp_path_factory.mktemp("dashboard")
    alpha, beta = root / "alpha", root / BETA
    for copy in (alpha, beta):
        shutil.copytree(finished_run.path, copy)
    half, _ = Run(beta).moments.halves()
    half.save(beta / "moments.safetensors")
    half.subspace(0.5).save(beta / "subspace.safetensors")
    first = Run(alpha).unprojected[0].id
    for name in ("corpus.jsonl", "unprojected.jsonl"):
        lines = [json.loads(line) for line in (alpha / name).read_text(encoding="utf-8").splitlines()]
        for line in lines:
            del line["sum"]  # the change is meant
            if line["id"] == first:
                line["prompt"] = HOSTILE
                line["completion"] = f"{HOSTILE} alpha {name} \u202e omega"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (alpha / name).write_text(text, encoding="utf-8")
    save_sweeps(Subject(alpha))
    return [alpha, beta]


def save_sweeps(subject):
    """A rank sweep over two ranks and a layer sweep, with numbers that are easy to recognise."""
    names = (
        "layers kind head projector rank width measure value low high random random_low random_high difference p_holm"
    )
    rows = [
        ["last_mid", "kv", "all", "per_head", rank, 8, measure, value, value - 0.1, value + 0.1, 0.5, 0.4, 0.6,
         value - 0.5, 0.01]
        for rank, shift in ((2, 0.0), (6, 1.0))
        for measure, value in (("aligned_loss", -0.25 + shift), ("kl", 0.75 + shift))
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=names.split()).to_csv(index=False)
    subject.folder.mkdir(exist_ok=True)
    (subject.folder / "rank_sweep.csv").write_text(table, encoding="utf-8")
    (subject.folder / "rank_sweep.json").write_text('{"reason": "Because of the test."}', encoding="utf-8")
    (subject.folder / "rank_sweep.html").write_text("<!DOCTYPE html><title>sweep</title>ranks", encoding="utf-8")
    (subject.folder / "layer_sweep.csv").write_text(table, encoding="utf-8")


@dataclass
class Watch:
    """What a page did that it should not do."""

    page: object
    errors: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def __post_init__(self):
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _dialog(self, dialog):
        self.errors.append(f"a dialog said {dialog.message}")
        dialog.dismiss()


@pytest.fixture(scope="session")
def chromium():
    """The machine's Chromium, headless; skipped by name where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def new_watch(chromium):
    """A new page at 1280 px, light, whose errors and requests are kept."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(90_000)  # a busy machine takes its time over a page of 5 MB
    return Watch(context.new_page())


@pytest.fixture
def watch(chromium):
    """A page of the test's own."""
    watch = new_watch(chromium)
    yield watch
    watch.page.context.close()
