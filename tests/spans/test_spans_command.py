"""`spd-lens spans`: from a task or one's own file to terminal and page; mistakes are one sentence and exit code 2."""

import json

import pytest

from spd_lens.cli import commands as cli


@pytest.fixture
def spans(tiny_qwen2_dir, monkeypatch, capsys):
    """Runs the command as the installed program does: arguments in, (exit code, stdout, stderr) out."""

    def run(*arguments, model=str(tiny_qwen2_dir)):
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr("sys.argv", ["spd-lens", "spans", *map(str, arguments), "--model", model])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return stopped.value.code, shown.out, shown.err

    return run


@pytest.fixture
def own(tmp_path):
    """A file of three worked sums, of which the last gives its answer away."""
    records = [
        {"prompt": "1 + 1?", "completion": "It is 2.", "spans": [[6, 7]]},
        {"prompt": "2 + 2?", "completion": "It is 4.", "answer": "4"},
        {"prompt": "5 + 0?", "completion": "It is 5.", "answer": "5"},
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_task(spans, tmp_path):
    html = tmp_path / "pages" / "math.html"
    code, out, _ = spans("synthetic-math", "--n", 5, "--show", 2, "--html", html, "--task-option", "difficulty=medium")
    assert code == 0
    assert out.count("⟦") == 2 + 1  # two examples, and the line that explains the marks
    assert "5 calibration examples" in out and "5 of 5 examples have scored tokens" in out
    text = html.read_text()
    assert text.count("<article") == 5 and "difficulty=medium" in text


def test_own_data(spans, own):
    code, out, _ = spans(own, "--task-option", "test_share=0")
    assert code == 0
    assert "3 calibration examples" in out and "1 of 3 is suspicious" in out
    assert "'5' can be read in the prompt" in out


def test_split_seed_and_format(spans):
    _, first, _ = spans("synthetic-qa", "--n", 2, "--split", "test", "--data-seed", 1, "--prompt-format", "raw")
    _, second, _ = spans("synthetic-qa", "--n", 2, "--split", "test", "--data-seed", 2)
    assert "2 test examples" in first and "raw format" in first and "chat format" in second
    assert "synthetic-qa-test" in first.split("Scored tokens")[0]
    assert first.split("Scored tokens")[0] != second.split("Scored tokens")[0]


def test_a_system_message_is_among_the_facts(spans):
    _, out, _ = spans("synthetic-qa", "--n", 1, "--system", "Be brief.")
    assert "system='Be brief.'" in out and "Be brief." in out.split("Scored tokens")[1]
    assert "system" not in spans("synthetic-qa", "--n", 1)[1].split("Scored tokens")[0]


def test_the_full_loss(spans):
    _, aligned, _ = spans("synthetic-qa", "--n", 1)
    _, full, _ = spans("synthetic-qa", "--n", 1, "--loss", "full")
    assert "Answer:⟦" in aligned and "⟦Answer" not in aligned
    assert "Answer:⟦" not in full


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gsm9k"], ["no task 'gsm9k'", "did you mean 'gsm8k'"]),
        (["synthetic-math", "--split", "dev"], ["no split 'dev'", "calibration, train, test"]),
        (["synthetic-math", "--n", "0"], ["0 calibration examples"]),
        (["OWN", "--n", "9"], ["9 calibration examples", "ask for fewer"]),
        (["missing.jsonl"], ["missing.jsonl"]),
        (["synthetic-math", "--loss", "partial"], ["loss", "partial"]),
        (["synthetic-math", "--prompt-format", "fancy"], ["prompt_format", "fancy"]),
        (["synthetic-math", "--prompt-format", "raw", "--system", "Be brief."], ["system='Be brief.'", "raw prompts"]),
        (["synthetic-math", "--no-enable-thinking"], ["takes no enable_thinking"]),
        (["synthetic-math", "--task-option", "colour=red"], ["no option 'colour'"]),
        (["synthetic-code", "--task-option", "executor=1"], ["no option 'executor'", "allow_code_execution"]),
        (["synthetic-math", "--html", "OWN/page.html"], ["page.html", "cannot be written"]),
        (["synthetic-qa", "--span", "results"], ["no span 'results'", "letter, line"]),
    ],
)
def test_mistakes(spans, own, arguments, words):
    code, _, err = spans(*(argument.replace("OWN", str(own)) for argument in arguments))
    assert code == 2
    assert err.count("error:") == 1 and len(err.splitlines()) == 1 and "Traceback" not in err
    for word in words:
        assert word in err


def test_another_span(spans):
    code, out, _ = spans("synthetic-code", "--span", "results", "--n", 4)
    assert code == 0 and "span=results" in out and "4 of 4 examples have scored tokens" in out


def test_a_model_that_is_not_there(spans, tmp_path):
    code, _, err = spans("synthetic-math", model=str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere does not exist" in err


def test_a_damaged_tokenizer(spans, tiny_qwen2_dir, tmp_path):
    for file in tiny_qwen2_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.name != "tokenizer.json" else b"{")
    code, _, err = spans("synthetic-math", model=str(tmp_path))
    assert code == 2 and "the tokenizer in" in err and "cannot be loaded" in err


def test_own_data_verbatim_with_spans_in_prompts(spans, tmp_path):
    records = [{"prompt": "Sum: 1 + 1\nAnswer:", "completion": " It is 42", "answer": "is", "prompt_spans": [[5, 10]]}]
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(records[0]) + "\n")
    common = (path, "--task-option", "test_share=0", "--prompt-format", "verbatim", "--no-add-special-tokens")
    code, out, _ = spans(*common, "--span-rule", "overlap")
    assert code == 0
    shown = out.split("Scored tokens")[0]
    assert shown.count("⟦") == 2 and "Answer: It⟦" in shown, "the blank before the completion is the data's own"
    assert "verbatim format" in out and "add_special_tokens=False" in out
    code, out, _ = spans(*common, "--span-rule", "inside")
    assert (
        code == 0 and "no token lies inside the span (4, 6)" in out.replace("\n", " ") and "span_rule='inside'" in out
    )
    code, out, _ = spans(*common, "--task-option", "prompt_template=Question: {prompt}?\nAnswer:")
    assert "Question: Sum: ⟦" in out and "Answer:?\nAnswer: It⟦" in out
