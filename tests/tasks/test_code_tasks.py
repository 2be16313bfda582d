"""MBPP, CodeAlpaca and what the code tasks share: spans, signatures, code extraction, programs."""

import subprocess
import sys

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError
from spd_lens.tasks.code import expected_values, signature


def run_here(code: str, tests, setup: str) -> bool:
    """A bare executor for code that comes from this repository or from the published references."""
    program = "\n".join([code, setup, *tests])
    return subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("test", "values"),
    [
        ("assert f(1) == 2", ["2"]),
        ("assert f(1)==[85, 75]", ["[85, 75]"]),
        ("assert f(1) == (4, 5) # sorted", ["(4, 5)"]),
        ("assert set(f(1)) == set((4, 5))", ["set((4, 5))"]),
        ("assert f('a == b') == 'c == d'", ["'c == d'"]),
        ("assert 2 == f(1)", ["2"]),
        ("assert f(1) == -1", ["-1"]),
        ("assert f('é→') == 'ü', 'é'", ["'ü'"]),  # ast counts bytes, spans are characters
        ("assert f(1) == [\n  1,\n  2]", ["[\n  1,\n  2]"]),
        ("assert math.isclose(f(1), 2.5, rel_tol=0.001)", ["2.5"]),
        ("assert isclose(2.5, f(1))", ["2.5"]),
        ("assert isinstance(f(1), int)", ["int"]),
        ("assert f(1) in (2, 3)", ["(2, 3)"]),
        ("assert f(1) is None", ["None"]),
        ("assert f(1) == 2 and f(2) == 3", ["2", "3"]),
        ("assert not f(1)", ["not"]),
        ("assert f(1)", ["f"]),
        ("assert f(1) == f(2)", ["f(2)"]),
        ("assert all(f(1))", ["all"]),
        ("assert (f(1)) == (5)", ["5"]),
        ("x = 3\nassert f(x) == 9", ["9"]),
    ],
)
def test_expected_values(test, values):
    assert [test[start:end] for start, end in expected_values(test, {"f"})] == values


@pytest.mark.parametrize(
    ("solution", "tests", "header"),
    [
        ("def g(y): return y\ndef f(x, *, k=2): return g(x)", ["assert f(1) == 1"], "def f(x, *, k=2)"),
        ("def f(x: list[int]) -> int: return 1", ["assert set(f(1)) == 1"], "def f(x: list[int])"),
        ("f = lambda x: x", ["assert f(1) == 1"], "def f(...)"),
    ],
)
def test_signature(solution, tests, header):
    assert signature(solution, tests)[0] == header


FULL = {
    "task_id": 601,
    "text": "Write a function to add one.",
    "code": "def add_one(x):\r\n\treturn x + 1\r\n",
    "test_setup_code": "",
    "test_list": ["assert add_one(1) == 2", "assert add_one(-1) == 0"],
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x",
    "task_id": 11,
    "prompt": "Write a function to halve.",
    "code": "def halve(x):\n  return x / 2",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(halve(3), 1.5)"],
}


def small_mbpp(write, full=(), sanitized=()):
    write("mbpp.jsonl", [FULL, *full])
    return write("sanitized-mbpp.json", [SANITIZED, *sanitized])


def test_mbpp_example(write):
    task = tasks.get("mbpp", path=small_mbpp(write))
    example = task.train(1)[0]
    assert example.id == "mbpp-full-601"
    assert example.prompt == (
        "Write a function to add one.\n\n"
        "Write the function `def add_one(x)` in Python, followed by 2 assert statements that test it."
    )
    assert example.completion == "def add_one(x):\n\treturn x + 1\n\nassert add_one(1) == 2\nassert add_one(-1) == 0"
    assert [example.completion[a:b] for a, b in example.spans] == ["2", "0"]


@pytest.mark.parametrize(
    ("span", "texts"),
    [("asserts", list(FULL["test_list"])), ("solution", ["def add_one(x):\n\treturn x + 1"])],
)
def test_mbpp_span_option(write, span, texts):
    example = tasks.get("mbpp", path=small_mbpp(write), span=span).train(1)[0]
    assert [example.completion[a:b] for a, b in example.spans] == texts


def test_asserts_stand_in_the_prompt_only_if_asked_for(write):
    path = small_mbpp(write)
    assert "assert add_one(1)" not in tasks.get("mbpp", path=path).train(1)[0].prompt
    assert "assert add_one(1) == 2" in tasks.get("mbpp", path=path, asserts_in_prompt=True).train(1)[0].prompt


def test_mbpp_scores_by_running(write):
    item = tasks.get("mbpp", path=small_mbpp(write)).test(1)[0]
    task = tasks.get("mbpp", path=small_mbpp(write), executor=run_here)
    assert task.score(item, item.completion) == 1.0  # needs the set-up's `import math`
    assert task.score(item, "```python\ndef halve(x):\n    return x / 2\n```\nIt halves.") == 1.0
    assert task.score(item, "def halve(x):\n    return x // 2") == 0.0
    assert task.score(item, "def half(x):\n    return x / 2") == 0.0
    assert task.score(item, "") == 0.0
    # a wrong assert of the model's own does not fail a right function
    assert task.score(item, "def halve(x):\n    return x / 2\nassert halve(2) == 2") == 1.0
    for refused in (lambda t: t.score(item, item.completion), lambda t: t.check_scorable()):
        with pytest.raises(SPDError, match="--allow-code-execution"):
            refused(tasks.get("mbpp", path=small_mbpp(write)))
    assert "executor" not in task.options()


def test_an_item_that_cannot_be_judged_scores_nothing_and_is_named_once(write, caplog):
    task = tasks.get("mbpp", path=small_mbpp(write), executor=lambda code, tests, setup: None)
    item = task.test(1)[0]
    assert task.judges(item)
    for scoring in ("final", "reference"):
        other = task.scored_by(scoring)
        assert (other.score(item, item.completion), other.judges(item)) == (0.0, False)
    assert [record.getMessage() for record in caplog.records] == [
        f"a wrong answer passes the tests of {item.id}: it cannot be judged, and scores 0"
    ]
    assert not task.with_results(item).marks.get("results")


def test_mbpp_splits(write):
    again = {**FULL, "task_id": 602, "text": "Write a function to HALVE"}  # the text of the sanitized test problem
    path = small_mbpp(write, full=[again], sanitized=[{**SANITIZED, "task_id": 2, "prompt": "Write nothing."}])
    assert [e.id for e in tasks.get("mbpp", path=path).pool("train")] == ["mbpp-full-601"]
    sanitized = tasks.get("mbpp", path=path, version="sanitized")
    assert [e.id for e in sanitized.pool("train")] == ["mbpp-sanitized-2"]
    assert [e.id for e in sanitized.pool("test")] == ["mbpp-sanitized-11"]


def test_mbpp_hub_copy_gives_the_same_records(write, hub):
    asked = hub({
        **{f"full/{split}": [] for split in ("prompt", "validation")},
        "full/train": [FULL],
        "sanitized/test": [SANITIZED],
    })  # fmt: skip
    local, remote = tasks.get("mbpp", path=small_mbpp(write)), tasks.get("mbpp")
    assert remote.pool("train") == local.pool("train") and remote.pool("test") == local.pool("test")
    assert [e.meta for e in remote.pool("test")] == [e.meta for e in local.pool("test")]
    assert asked[0][:2] == ("google-research-datasets/mbpp", "full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_list": []}, "no asserts"),
        ({"test_list": ["assert ("]}, "not valid Python"),
        ({"test_list": ["print(1)"]}, "not valid Python .no assert"),
        ({"code": "def f(:"}, "not valid Python"),
        ({"test_list": "assert 1"}, "must be a list of texts"),
        ({"task_id": "x"}, "must be a finite number"),
        ({"task_id": 601.5}, "must be a whole number"),
    ],
)
def test_mbpp_bad_records(write, change, message):
    write("mbpp.jsonl", [FULL, {**FULL, "task_id": 603, **change}])
    with pytest.raises(SPDError, match=f"mbpp.jsonl, line 2: .*{message}"):
        tasks.get("mbpp", path=write("sanitized-mbpp.json", [SANITIZED])).train(1)


def test_published_mbpp(data):
    task = tasks.get("mbpp", path=data)
    train, test = task.pool("train"), task.pool("test")
    assert (len(train), len(test)) == (472, 257)  # 10 + 464 full problems, of which 2 have the text of a test problem
    assert not {task.problem(e) for e in train} & {task.problem(e) for e in test}
    lengths = sorted(sum(end - start for start, end in e.spans) for e in train + test)
    assert lengths[0] >= 3 and lengths[len(lengths) // 2] == 14  # characters; table 6: 5 to 20 tokens
    assert all(len(e.spans) >= len(e.meta["tests"]) for e in test)
    scored = tasks.get("mbpp", path=data, executor=run_here)
    assert all(scored.score(e, e.completion) == 1.0 for e in scored.test(4, seed=0))
    assert len(tasks.get("mbpp", path=data, version="full").pool("test")) == 500


ALPACA = [{"instruction": f"Print {i}.", "input": "" if i else "zero", "output": f"print({i})"} for i in range(20)]


def test_codealpaca(write, hub):
    records = [*ALPACA, {"instruction": "Say nothing.", "input": "", "output": " "}]
    local = tasks.get("codealpaca", path=write("code_alpaca_2k.json", records))
    assert (len(local.pool("train")), len(local.pool("test"))) == (18, 2)  # the one without an output is left out
    zero = next(e for e in local.pool("train") + local.pool("test") if e.id == "codealpaca-0")
    assert zero.prompt == "Print 0.\n\nInput:\nzero"
    assert zero.spans == ((0, len("print(0)")),)
    assert list(local.sources()) == ["code_alpaca_2k.json"]
    hub({"train": records})
    assert tasks.get("codealpaca").pool("train") == local.pool("train")


def test_codealpaca_score_and_spans(write):
    fenced = {"instruction": "Print.", "input": "", "output": "Use this:\n```python\nprint( 1 )\n```\nDone."}
    path = write("new_codealpaca.json", [fenced, *ALPACA])
    task = tasks.get("codealpaca", path=path, file="new_codealpaca.json", span="code")
    item = next(e for e in task.pool("train") + task.pool("test") if e.id == "codealpaca-0")
    assert [item.completion[a:b] for a, b in item.spans] == ["print( 1 )"]
    assert task.score(item, "print( 1  )\n") == 1.0
    assert task.score(item, item.completion) == 1.0
    assert task.score(item, "<think>\n```\nprint(2)\n```\n</think>\r\n```\r\nprint( 1 )\r\n```") == 1.0
    assert task.score(item, "print( 2 )") == task.score(item, "") == 0.0


def test_codealpaca_files(write, tmp_path):
    with pytest.raises(SPDError, match="needs one of code_alpaca_20k.json"):
        tasks.get("codealpaca", path=tmp_path).train(1)
    with pytest.raises(SPDError, match="no file '../secret.json'"):
        tasks.get("codealpaca", path=tmp_path, file="../secret.json")


def test_published_codealpaca(data):
    task = tasks.get("codealpaca", path=data)
    assert (len(task.pool("train")), len(task.pool("test"))) == (1813, 202)
    assert list(task.sources()) == ["code_alpaca_2k.json"]
    assert all(task.score(e, e.completion) == 1.0 for e in task.test(100))
