"""A study made part by part, by workers on this machine, Ray or submitit: what it makes is what one process makes."""

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import threading
import time
from concurrent.futures import Future

import fsspec
import pytest

from spd_lens.errors import SPDError
from spd_lens.files.publishing import file_sha256
from spd_lens.files.store import Store
from spd_lens.study import cluster
from spd_lens.study.cluster import assemble, here, on_ray, on_submitit, run_parts
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study
from spd_lens.study.parts import Manifest, Part, Record, make_part, parts_of, units_of
from spd_lens.study.plan import schedule
from tests.helpers import refused
from tests.study.test_engine import contents

SPD = Part("synthetic-math", "spd", 1)


@pytest.fixture(scope="module")
def config(study_of):
    """Two cells, of which one projects; everything in float32 and small."""
    math = {"synthetic-math": {"max_new_tokens": 8}}
    return study_of(
        targets=["synthetic-math"], seeds=[1], task_options=math, n_forced=4, n_side_effects=1,
        settings={"n_train": 4, "n_eval": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The study as one process makes it."""
    return run_study(config, tmp_path_factory.mktemp("alone") / "study")


def test_x(config, alone, tmp_path):
    t = time.time()
    study = run_parts(config, tmp_path / "study", store="memory://first")
    print("took", time.time() - t)
    mine, theirs = contents(study.path), contents(alone.path)
    print(sorted(mine))
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if mine[name] != theirs[name]} == set()
