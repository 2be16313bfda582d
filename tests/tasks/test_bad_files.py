"""Files that are missing, cut off, or not what they should be; a hub that is out of reach."""

import json
import os
import subprocess
import sys

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError

GOOD = {"question": "What?", "answer": "#### 1"}
LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl is empty; download it again"),
        (LINE + "\n" + LINE[:20], "train.jsonl, line 2: not JSON .*the file may be cut off"),
        (LINE + "\n{bad}\n" + LINE, "train.jsonl, line 2: not JSON"),
        (LINE + "\n[1]\n", "train.jsonl, line 2: not a JSON object but .1."),
        (LINE + '\n{"question": "What?"}\n', "train.jsonl, line 2: the field 'answer' is missing; there are question"),
        (LINE + '\n{"question": "What?", "answer": "1"}\n', "line 2: the field 'answer' does not end with '#### '"),
        (LINE + '\n{"question": null, "answer": "#### 1"}\n', "line 2: the field 'question' must be a text"),
        (LINE.encode() + b"\n\xff\xfe\n", "train.jsonl, line 2: not UTF-8"),
        ("<html>404</html>", "train.jsonl is a web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "train.jsonl is a git-lfs pointer"),
        ("[" * 100_000, "line 1: not readable as JSON|line 1: not JSON"),
        ('{"question": ' + "9" * 5000 + "}", "not readable as JSON|must be a text"),
    ],
)
def test_jsonl(write, content, message):
    write("test.jsonl", [GOOD])
    with pytest.raises(SPDError, match=message) as raised:
        tasks.get("gsm8k", path=write("train.jsonl", content)).train(1)
    assert "\n" not in str(raised.value)


def test_line_separators_inside_a_string_are_no_line_breaks(write):
    odd = {"question": "What\u2028is\x85this?", "answer": "#### 1"}
    write("train.jsonl", json.dumps(odd, ensure_ascii=False) + "\n")
    assert tasks.get("gsm8k", path=write("test.jsonl", [GOOD])).train(1)[0].meta["answer"] == "1"


def test_missing_file(write):
    with pytest.raises(SPDError, match="test.jsonl is missing; gsm8k needs train.jsonl and test.jsonl"):
        tasks.get("gsm8k", path=write("train.jsonl", [GOOD])).test(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"ID": "chal-1", "Body"', "SVAMP.json, line 1: not JSON .*cut off"),
        ("{}", "holds no list of records"),
        ("[1]", "SVAMP.json, record 1: not a JSON object but 1"),
        ([{"ID": "chal-1", "Body": "b", "Question": "q", "Equation": "1", "Answer": "NaN"}], "must be a finite number"),
        ([{"ID": "chal-1", "Body": "b", "Question": "q", "Equation": "1", "Answer": [1]}], "must be a finite number"),
        ([{"ID": "chal-1", "Body": "b", "Question": "q", "Equation": 1, "Answer": 1}], "'Equation' must be a text"),
    ],
)
def test_json(write, content, message):
    with pytest.raises(SPDError, match=message):
        tasks.get("svamp", path=write("SVAMP.json", content)).train(1)


def write_mmlu(write, test_content, subject="anatomy"):
    row = "What?,a,b,c,d,A\n"
    write(f"dev/{subject}_dev.csv", row.replace("What", "Who"))
    write(f"val/{subject}_val.csv", row.replace("What", "When"))
    return write(f"test/{subject}_test.csv", test_content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("What?,a,b,c,d,A\nWhy?,a,b", "anatomy_test.csv, line 2: 3 columns where 6 are needed .*cut off"),
        ('What?,a,b,c,d,A\n"Why', "anatomy_test.csv, line 2: not CSV .*cut off"),
        ("What?,a,b,c,d,E\n", "line 1: the answer must be A, B, C or D, and is 'E'"),
        ("What?,a,,c,d,A\n", "line 1: the field 'B' must be a text"),
        ('"' + "x" * 200_000 + '",a,b,c,d,A\n', "line 1: not CSV .field larger"),
    ],
)
def test_csv(write, content, message):
    with pytest.raises(SPDError, match=message):
        tasks.get("mmlu", path=write_mmlu(write, content), subjects=["anatomy"]).test(1)


def test_csv_line_numbers_count_lines_inside_quotes(write):
    content = 'What?,"a\nb",b,c,d,A\nWhy?,a,b,c,d\n'
    with pytest.raises(SPDError, match="anatomy_test.csv, line 3: 5 columns"):
        tasks.get("mmlu", path=write_mmlu(write, content), subjects=["anatomy"]).test(1)


def test_bbh_without_examples(write):
    with pytest.raises(SPDError, match="navigate.json: holds no list of records under 'examples'"):
        tasks.get("bbh", path=write("navigate.json", '{"canary": "x"}'), subtasks=["navigate"]).test(1)


def test_unreachable_hub_names_the_local_form():
    """In a process of its own, since the library reads `HF_HUB_OFFLINE` when it is imported."""
    code = (
        "import spd_lens.tasks as tasks\n"
        "from spd_lens.errors import SPDError\n"
        "try: tasks.get('gsm8k', hub='nobody/nothing-there').train(1)\n"
        "except SPDError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "cannot read nobody/nothing-there (train) from the hub" in run.stdout
    assert "give path= (--data-dir), a directory with train.jsonl and test.jsonl" in run.stdout
    assert run.stdout.count("\n") == 1
