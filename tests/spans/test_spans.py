"""The span audit: faithful tokens, every flag on a made-up case, counts, and hostile text in page and terminal."""

import http.server
import io
import os
import re
import shutil
import subprocess
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from spd_lens.examples import Example
from spd_lens.models.prompts import PromptFormat
from spd_lens.models.tokenizer import load_tokenizer
from spd_lens.spans.core import PAPER_SIZES, audit
from spd_lens.spans.page import page, write_page
from spd_lens.spans.terminal import headline, print_audit
from tests.helpers import EXAMPLES, refused

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '</pre><script>console.error("ran")</script><img src="http://127.0.0.1:PORT/leak" onerror="x()">"\'><b>& 42'


@pytest.fixture(scope="module")
def raw(tiny_llama_dir):
    return PromptFormat.choose(load_tokenizer(str(tiny_llama_dir)))


@pytest.fixture(scope="module")
def chat(tiny_qwen2_dir):
    return PromptFormat.choose(load_tokenizer(str(tiny_qwen2_dir)))


@pytest.fixture(params=["raw", "chat"])
def form(request):
    return request.getfixturevalue(request.param)


def one(example, form, loss="aligned"):
    return audit([example], form, loss).examples[0]


def kinds(item, suspicious=True):
    return {flag.kind for flag in item.flags if flag.suspicious == suspicious}


def spanning(completion, value, prompt="What is it?"):
    """An example whose span is the last `value` in the completion."""
    start = completion.rindex(value)
    return Example(prompt, completion, ((start, start + len(value)),), "made-up")


# --- tokens


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.id)
@pytest.mark.parametrize("loss", ["aligned", "full"])
def test_pieces_are_the_text_and_the_tokens_of_the_loss(example, form, loss):
    item, encoded = one(example, form, loss), form.encode(example, loss)
    tokens = [piece for piece in item.pieces if piece.id is not None]
    assert "".join(piece.text for piece in item.pieces) == form.text(example.prompt) + example.completion
    assert [piece.id for piece in tokens] == encoded.ids
    assert [piece.position for piece in tokens] == list(range(len(encoded.ids)))
    assert [piece.position for piece in tokens if piece.scored] == encoded.scored
    assert [piece.position for piece in tokens if piece.in_completion][0] == encoded.completion_start
    assert item.size == len(encoded.scored) == len(item.places)


def test_a_character_split_over_tokens_stands_once_and_all_its_tokens_are_marked(chat):
    item = one(spanning("see 🦩 fly", "🦩"), chat)
    scored = [piece for piece in item.pieces if piece.scored]
    assert [piece.text for piece in scored] == ["🦩", "", "", ""]
    assert len({piece.id for piece in scored}) == 4


def test_characters_that_the_tokenizer_drops_are_shown_too(chat, monkeypatch):
    joint = PromptFormat.joint

    def without_blanks(self, example, **options):  # as tokenizers do whose offsets leave out the blanks
        found = joint(self, example, **options)
        trimmed = [(low + (found.text[low:high][:1] == " "), high) for low, high in found.offsets]
        return type(found)(found.text, found.completion_at, found.ids, trimmed)

    monkeypatch.setattr(PromptFormat, "joint", without_blanks)
    item = one(spanning("The answer is 42.", "42"), chat)
    assert any(piece.id is None and piece.text == " " for piece in item.pieces)
    assert "".join(piece.text for piece in item.pieces).endswith("The answer is 42.")


# --- flags


def test_an_ordinary_example_has_no_flags(chat):
    item = one(Example("7 * 3", "7 * 3 = 21 dollars.\n", ((8, 10),)), chat)
    assert (item.flags, item.suspicious, item.copied) == ((), False, 0)


def test_an_answer_that_can_be_copied(chat):
    example = Example("7 * 3", "7 * 3 = 21 dollars.\n#### 21", ((25, 27),))
    item = one(example, chat)
    assert kinds(item, suspicious=False) == {"copied"} and not item.suspicious
    assert item.copied == item.size == len(chat.encode(example).scored)
    first = replace(example, spans=((8, 10), (25, 27)))  # the first 21 is no copy
    found = audit([item.example, first, Example("q", "4", ((0, 1),))], chat)
    n = len(chat.encode(replace(example, spans=((8, 10),))).scored)
    assert [one.copied for one in found.examples] == [item.size, item.size, 0]
    assert found.summary()["share_copied"] == 2 * item.size / (2 * item.size + n + found.examples[2].size)
    assert f"{found.share_copied:.0%} of the scored tokens can be copied" in headline(found)
    assert f"{found.share_copied:.0%}" in page(found, title="t")
    assert audit([example], chat, "full").share_copied is None


def test_no_span(chat):
    item = one(Example("Hi?", "Hello there"), chat)
    assert kinds(item) == {"empty"}
    assert item.size == 0 and item.places == ()
    assert "".join(piece.text for piece in item.pieces if piece.in_completion) == "Hello there"


def test_a_span_of_white_space(chat):
    item = one(Example("Hi?", "Hello  there", ((5, 6),)), chat)
    assert "empty" in kinds(item)
    assert "(5, 6)" in next(flag.text for flag in item.flags if flag.kind == "empty")


def test_no_completion_is_a_flag_with_a_sentence_and_no_exception(chat):
    item = one(Example("Hi?", id="open-7"), chat)
    assert kinds(item) == {"unusable"}
    assert "'open-7' has no completion" in item.flags[0].text


def test_half_a_character_is_a_flag_with_a_sentence_and_no_exception(chat):
    good = spanning("It is 42.", "42")
    found = audit([Example("Hi \ud800?", "42", ((0, 2),), "half"), good], chat)
    assert kinds(found.examples[0]) == {"unusable"} and found.examples[0].pieces == ()
    assert r"'\ud800'" in found.examples[0].flags[0].text
    assert found.examples[1].size > 0
    page(found, title="t").encode()  # and the page can be written


def test_the_whole_completion(chat):
    assert kinds(one(Example("7 * 3", "21", ((0, 2),)), chat)) == {"whole"}
    assert kinds(one(Example("7 * 3", "21\n", ((0, 2),)), chat)) == {"whole"}
    assert kinds(one(Example("7 * 3", "= 21", ((2, 4),)), chat)) == set()


def of_apples(form, low, high):
    """An example whose span is a part of " apples", which is one token."""
    item = one(Example("Hi?", "Tom has apples", ((7 + low, 7 + high),)), form)
    piece = next(piece for piece in item.pieces if piece.scored)
    assert (piece.text, item.size) == (" apples", 1)
    return item, piece


def test_a_span_that_begins_inside_a_token(chat):
    item, piece = of_apples(chat, 3, 7)
    assert [flag.kind for flag in item.flags] == ["begins-inside"] and item.suspicious
    assert f"token {piece.position} ' apples': ' ap' is scored too" in item.flags[0].text


def test_a_span_that_ends_inside_a_token(chat):
    item, piece = of_apples(chat, 0, 4)
    assert [flag.kind for flag in item.flags] == ["ends-inside"] and item.suspicious
    assert f"token {piece.position} ' apples': 'les' is scored too" in item.flags[0].text


def test_the_blank_before_a_word_is_remarked_but_not_suspicious(chat):
    item, _ = of_apples(chat, 1, 7)
    assert [(flag.kind, flag.suspicious) for flag in item.flags] == [("begins-inside", False)]
    assert not item.suspicious
    assert of_apples(chat, 0, 7)[0].flags == ()


@pytest.mark.parametrize(
    ("value", "prompt", "there"),
    [
        ("5", "She has 5 pens", True),
        ("5", "She has 5.", True),
        ("5", "pens: (5)", True),
        ("5", "She has 15 pens", False),
        ("5", "She has 1.5 pens", False),
        ("5", "She has 5,000 pens", False),
        ("1,000", "She has 1,000 pens", True),
        ("[2, 4]", "f([1, 2]) == [2, 4]", True),
        ("a.c", "abc", False),
        ("blue", "The bluebird", False),
        ("Blue", "The blue bird", False),
    ],
)
def test_an_answer_that_stands_in_the_prompt(chat, value, prompt, there):
    assert ("in-prompt" in kinds(one(spanning(f"I say {value} !", value, prompt), chat))) == there


def test_the_letter_of_a_choice_is_in_the_prompt_by_design(chat):
    item = one(spanning("Answer: C", "C", "Which?\nA. Earth\nB. Mars\nC. Jupiter"), chat)
    assert "in-prompt" in kinds(item, suspicious=False)
    assert not item.suspicious


def test_which_of_several_answers_stand_in_the_prompt(chat):
    example = Example("Is 31 prime?", "31 and 47 and 53", ((0, 2), (7, 9), (14, 16)))
    flag = next(flag for flag in one(example, chat).flags if flag.kind == "in-prompt")
    assert flag.text.startswith("1 of 3 answers: '31'")


def test_a_token_that_prompt_and_completion_share(raw):
    item = one(Example("def add(a, b):", "    return a + b", ((15, 16),)), raw)
    assert "shared" in kinds(item)
    assert "shared" not in kinds(one(Example("def add(a, b):", "return a + b", ((11, 12),)), raw))


def test_the_full_loss_does_not_look_at_spans(chat):
    found = audit([Example("7 * 3", "21 it is"), Example("7 * 3", "It is 3", ((6, 7),))], chat, "full", task="gsm8k")
    assert all(not item.flags for item in found.examples)
    assert all(piece.scored for item in found.examples for piece in item.pieces if piece.in_completion)
    assert found.paper_sizes is None  # table 6 is about the aligned loss


def test_an_unknown_loss_is_refused(chat):
    with refused("'partial'", "'aligned'"):
        audit([], chat, "partial")


# --- counts


def test_counts(chat):
    wide = Example("Hi?", "x" + " 7" * 30 + " y", ((1, 61),), "wide")
    found = audit([*EXAMPLES, Example("Hi?", "no span"), wide], chat, task="gsm8k")
    sizes = [len(chat.encode(example).scored) for example in [*EXAMPLES, wide]]
    assert list(found.sizes) == sizes
    assert sum(bar.count for bar in found.size_bins()) == len(sizes)
    for bar in found.size_bins():
        assert bar.count == sum(bar.low <= size <= bar.high for size in sizes)
    assert sum(bar.count for bar in found.place_bins()) == pytest.approx(len(sizes))
    assert PAPER_SIZES["gsm8k"] == (1, 3)
    assert found.share_in_paper_sizes == sum(1 <= size <= 3 for size in sizes) / len(sizes) < 1
    summary = found.summary()
    assert (summary["examples"], summary["scored"]) == (len(sizes) + 1, len(sizes))
    assert summary["span_tokens"] == {"min": min(sizes), "median": 2, "max": max(sizes)}
    assert summary["flags"]["empty"] == {"suspicious": 1, "notes": 0}
    assert summary["suspicious"] == sum(item.suspicious for item in found.examples)


def test_places_begin_at_the_completion(chat):
    def places(completion, span):
        item = one(Example("Hi?", completion, (span,)), chat)
        return sum(piece.in_completion for piece in item.pieces), item.places

    n, first = places("4 a b c", (0, 1))
    assert first == (0.5 / n,)
    n, last = places("a b c4", (5, 6))
    assert last == (1 - 0.5 / n,)
    bins = audit([Example("Hi?", "4 a b c", ((0, 1),))], chat).place_bins(2)
    assert [(bar.low, bar.high, bar.count) for bar in bins] == [(0, 0.5, 1), (0.5, 1, 0)]


def test_nothing_at_all(chat):
    found = audit([], chat, task="mmlu")
    assert found.size_bins() == () and found.summary()["span_tokens"] == {}
    assert found.share_in_paper_sizes is None
    assert page(found, title="none").endswith("</html>\n")
    print_audit(Console(file=io.StringIO()), found, title="none")


def test_the_headline_compares_with_table_6(chat):
    found = audit([spanning("Answer: C", "C"), spanning("Answer: Venus and Mars", "Venus and Mars")], chat, task="mmlu")
    assert "The paper's table 6 says 1 for mmlu: 50% of these examples lie there." in headline(found)


# --- terminal and page


def hostile(port=0):
    """Text that would run, load, turn the line around or colour the terminal."""
    text = HOSTILE.replace("PORT", str(port)) + "\u202e\x1b[31m\x9b32m [bold]x[/bold]"
    return Example(text, f"{text}\n#### 42", ((len(text) + 6, len(text) + 8),), text)


def printed(found, **options):
    out = io.StringIO()
    print_audit(Console(file=out, width=160, force_terminal=True), found, title="[red]t[/red]", **options)
    return out.getvalue()


def test_scored_tokens_are_marked_without_colour(chat):
    out = io.StringIO()
    print_audit(Console(file=out, width=160, color_system=None), audit([spanning("It is 423.", "423")], chat), title="")
    assert "It is ⟦4│2│3⟧." in out.getvalue()
    assert "⟦" not in printed(audit([spanning("It is 42.", "42")], chat), show=0).split("example")[0]


def test_hostile_text_does_not_reach_the_terminal(chat):
    shown = printed(audit([hostile()], chat))
    assert not any(mark in shown for mark in ("\x1b[31m", "\x9b", "\u202e"))
    assert "[bold]x[/bold]" in shown and "[red]t[/red]" in shown  # nor is it taken for rich's markup


def test_many_examples_are_cut_with_the_suspicious_ones_first(chat):
    examples = [Example("Hi?", "It is 42.", ((6, 8),), f"fine-{i}") for i in range(60)]
    shown = printed(audit([*examples, Example("Hi?", "no span", id="bad-one")], chat), show=0)
    assert "bad-one" in shown and "40 of 61" in shown
    assert "fine-59" not in shown


def test_all_text_in_the_page_is_escaped(chat):
    html = page(audit([hostile()], chat), title=HOSTILE, facts=[HOSTILE])
    assert "<script" not in html and "<img" not in html and "<b>&" not in html
    assert 'onerror="' not in html
    assert "\u202e" not in html and "\x1b" not in html
    assert "&lt;script&gt;" in html


def test_the_page_marks_the_scored_tokens_with_their_ids(chat):
    found = audit([spanning("It is 423.", "423")], chat)
    html = page(found, title="t")
    marked = re.findall(r'<span class="s" title="position (\d+) · id (\d+) [^"]*">', html)
    scored = [piece for piece in found.examples[0].pieces if piece.scored]
    assert marked == [(str(piece.position), str(piece.id)) for piece in scored]
    assert html.count("<svg") == 2 and html.count("<article") == 1


def test_a_page_that_cannot_be_written_is_refused(chat, tmp_path):
    (tmp_path / "file").write_text("")
    with refused("file/page.html", "cannot be written"):
        write_page(tmp_path / "file" / "page.html", audit([], chat), title="t")


class _Recorder(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # the name that http.server calls
        self.server.seen.append(self.path)
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A listener on this machine that notes every request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Recorder)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def browse(path, profile):
    """The document as the browser made it, and what it wrote to the console."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={profile}", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
def test_a_browser_shows_the_page_without_error_or_request(chat, tmp_path, server):
    path = write_page(tmp_path / "page.html", audit([hostile(server.server_port)], chat), title="t")
    dom, console = browse(path, tmp_path / "profile")
    assert console == [] and server.seen == []
    assert dom.count("<article") == 1 and "</article>" in dom
    assert "<script" not in dom and "<img" not in dom

    # the same text unescaped is noticed, so that the lines above can fail
    path.write_text(f"<pre>{hostile(server.server_port).prompt}</pre>", encoding="utf-8")
    _, console = browse(path, tmp_path / "profile")
    assert any("ran" in line for line in console) and server.seen == ["/leak"]

    # and the page's own policy stops what gets past the escaping
    careless = page(audit([], chat), title="t").replace("<main>", "<main>" + hostile(server.server_port).prompt)
    path.write_text(careless, encoding="utf-8")
    server.seen.clear()
    _, console = browse(path, tmp_path / "profile")
    assert not any("ran" in line and "Refused" not in line and "policy" not in line.lower() for line in console)
    assert server.seen == []


# --- prompts verbatim, spans of prompts, tokens inside a span only


@pytest.fixture(scope="module")
def verbatim(tiny_llama_dir):
    return PromptFormat.choose(load_tokenizer(str(tiny_llama_dir)), "verbatim")


def test_a_shared_token_is_shown_with_the_border_in_it(verbatim):
    example = Example("1=a", "n-9", ((2, 3),))  # <bos> 1 = an - 9
    item = one(example, verbatim)
    assert verbatim.encode(example).shared == "an"
    (flag,) = [flag for flag in item.flags if flag.kind == "shared"]
    assert "token 3 'an'" in flag.text and flag.suspicious
    assert "in the prompt with 'a' and ends in the completion with 'n'" in flag.text
    assert "shared" not in kinds(one(Example("1=", "an-9", ((3, 4),)), verbatim))


def test_spans_of_prompts_are_shown_and_checked(form, tmp_path):
    example = Example("Is 42 even?", "It is.", prompt_spans=((2, 5), (10, 11), (2, 3)), id="even")
    item = one(example, form)
    assert not [piece for piece in item.pieces if piece.scored and piece.in_completion]
    scored = "".join(piece.text for piece in item.pieces if piece.scored)
    assert scored.replace(" ", "") == "42?"
    assert item.size == len(form.encode(example).scored) and item.places == ()
    assert [flag.text for flag in item.flags if flag.kind == "empty"] == [
        "prompt span (2, 3) holds nothing but white space"
    ]
    found = audit([example], form)
    assert found.place_bins() == () and found.size_bins()
    out = printed(found)
    assert "⟦" in out.split("Scored tokens")[0] and "Where in the completion" not in out
    text = page(found, title="t")
    prompt = text.split('<pre class="prompt"')[1].split("</pre>")[0]
    assert 'class="s"' in prompt and "of the completion" not in text.split("<article")[1].split("</header>")[0]
    assert write_page(tmp_path / "spans.html", found, title="t").exists()


def test_a_long_prompt_is_cut_before_its_first_scored_token(verbatim):
    prompt = "word " * 300 + "42 and " + "more " * 200
    example = Example(prompt, "yes", prompt_spans=((1500, 1502),))
    out = printed(audit([example], verbatim)).replace("\n", "")
    assert "[...]" in out and "⟦" in out.split("Scored tokens")[0]
    assert out.count("more") == 200 and 0 < out.count("word") < 300


def test_tokens_that_the_inside_rule_leaves_out_are_named(tiny_llama_dir):
    form = PromptFormat.choose(load_tokenizer(str(tiny_llama_dir)), "verbatim", span_rule="inside")
    example = Example("q=", "It is 42.", ((4, 9),))  # I t _is _42 .
    item = one(example, form)
    assert [piece.text for piece in item.pieces if piece.scored] == [" 42", "."]
    (flag,) = [flag for flag in item.flags if flag.kind == "begins-inside"]
    assert "' is'" in flag.text and "not scored" in flag.text and flag.suspicious
    found = audit([example], form)
    assert "wholly inside a span" in page(found, title="t")
    other = audit([example], replace(form, span_rule="overlap"))
    assert "overlap a span" in page(other, title="t")
    assert [flag.text for flag in other.examples[0].flags if flag.kind == "begins-inside"] == [
        "span 's 42.' begins inside token 5 ' is': ' i' is scored too"
    ]
    (flag,) = one(Example("q=", "It is 42.", ((4, 5),)), form).flags
    assert flag.kind == "unusable" and "no token lies inside the span (4, 5)" in flag.text and "5 ' is'" in flag.text
