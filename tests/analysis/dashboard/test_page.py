"""The page in a real headless Chromium, opened from a file."""

import json
import socket

import pytest

from spd_lens.analysis.common.subject import subjects
from spd_lens.analysis.dashboard.command import write_dashboard
from spd_lens.analysis.dashboard.document import assemble

from .conftest import BETA, HOSTILE, new_watch

PLOTS = ("energy", "spectrum", "loss", "kl", "outcomes", "overlap", "overlap-rank", "map", "layers")


@pytest.fixture(scope="module")
def written(two_runs):
    return write_dashboard(two_runs, two_runs[0].parent / "page.html")


@pytest.fixture(scope="module")
def document(two_runs):
    return json.loads(json.dumps(assemble(subjects(two_runs))))


@pytest.fixture(scope="module")
def opened(chromium, written):
    watch = new_watch(chromium)
    watch.page.goto(written.as_uri())
    watch.page.wait_for_selector("html[data-ready=yes]")
    yield watch
    watch.page.context.close()


@pytest.fixture
def page(opened, written):
    """The page as it is when it opens (opened once: it is large); no test may cause an error or a request."""
    yield opened.page
    assert opened.errors == []
    assert opened.requests == [written.as_uri()]
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(color_scheme="light")
    opened.page.evaluate(
        """() => {
        for (const id of ["measure", "map-measure", "text-set"]) $(id).selectedIndex = 0;
        $("text-search").value = ""; theme = null; state.site = state.head = null;
        applyTheme(); chooseRun(0); $("run").value = 0; drawAll();
        }"""
    )


def traces(page, plot):
    """Data of a figure, by name."""
    return {t["name"]: t for t in page.evaluate(f"document.getElementById('plot-{plot}').data") if t.get("name")}


def marker(page, plot):
    return page.evaluate(f"document.getElementById('plot-{plot}').layout.shapes[0].x0")


def settle(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def move(page, rank):
    page.locator("#rank").evaluate(
        "(slider, rank) => { slider.value = rank; slider.dispatchEvent(new Event('input')); }", rank
    )
    settle(page)


def choose(page, id, value):
    page.select_option(f"#{id}", value)
    settle(page)


def test_opens_from_a_file_without_errors_or_requests(page):
    for plot in PLOTS:
        data = page.evaluate(f"JSON.stringify(document.getElementById('plot-{plot}').data)")
        assert "NaN" not in data and json.loads(data), plot
        figure = page.evaluate(f"document.getElementById('plot-{plot}').layout")
        assert figure["xaxis"]["title"]["text"] and figure["yaxis"]["title"]["text"], plot
    names = set(traces(page, "energy"))
    assert any("null: random directions" in name for name in names) and any(
        "null: activations" in name for name in names
    )


def test_the_slider_moves_energy_overlap_and_loss_together(page, document):
    site = page.input_value("#site")
    block = document["runs"][0]["blocks"][site]["0"]
    z = {}
    for rank in (1, 4, 7):
        move(page, rank)
        assert [marker(page, plot) for plot in ("energy", "spectrum", "overlap-rank", "loss", "kl")] == [rank] * 5
        shown = traces(page, "energy")["at rank"]["y"]
        assert shown[0] == block["energy"][rank - 1]
        assert f"{100 * block['energy'][rank - 1]:.1f}%" in page.inner_text("#readouts")
        assert page.input_value("#rank-number") == str(rank)
        z[rank] = page.evaluate("document.getElementById('plot-overlap').data[0].z")
        assert z[rank][0][1] == document["overlap"][site]["0"]["energy"][0][1][rank - 1]
        assert z[rank][0][0] == block["halves"][rank - 1]
        # of the sweep, what lies nearest
        assert ("−0.250" if rank < 4 else "+0.750" if rank > 4 else "") in page.inner_text("#readouts")
    assert z[1] != z[4] != z[7]


def test_the_slider_works_by_keyboard_and_by_number(page):
    page.focus("#rank")
    page.keyboard.press("Home")
    settle(page)
    assert marker(page, "energy") == 1
    page.keyboard.press("ArrowRight")
    settle(page)
    assert marker(page, "energy") == 2
    page.fill("#rank-number", "6")
    settle(page)
    assert marker(page, "energy") == 6
    page.fill("#rank-number", "999")
    page.keyboard.press("Tab")
    settle(page)
    assert (marker(page, "energy"), page.input_value("#rank-number")) == (8, "8")


def test_selectors_of_site_and_head_change_the_curves(page, document):
    blocks = document["runs"][0]["blocks"]
    seen = []
    for site, head in (("1.k", "0"), ("1.k", "1"), ("1.k", "all"), ("1.v", "1"), ("3.k", "1")):
        choose(page, "site", site)
        choose(page, "head", head)
        y = traces(page, "energy")["gradients, 95% band"]["y"]
        assert y == blocks[site][head]["energy"], (site, head)
        other = traces(page, "overlap-rank")[f"gradients of {label(BETA)}"]["y"]
        assert other == document["overlap"][site][head]["energy"][0][1]
        seen.append(tuple(y))
    assert len(set(seen)) == len(seen)


def label(text):
    return text.replace("<", "&lt;").replace(">", "&gt;")


def test_the_rank_keeps_its_share_of_the_width_from_a_head_to_all_heads(page):
    move(page, 4)
    choose(page, "head", "all")
    assert marker(page, "energy") == 8 and page.get_attribute("#rank", "max") == "16"
    assert marker(page, "loss") == 4  # the sweep was per head
    assert "joint" in page.inner_text("#energy-says")


def test_the_selector_of_runs_changes_everything(page, document):
    before = traces(page, "energy")["gradients, 95% band"]["y"]
    choose(page, "run", "1")
    site = page.input_value("#site")
    assert (
        traces(page, "energy")["gradients, 95% band"]["y"]
        == document["runs"][1]["blocks"][site]["0"]["energy"]
        != before
    )
    assert BETA in page.inner_text("#overlap-caption")
    assert "null: random, mean" in traces(page, "loss") and "projected" in traces(
        page, "loss"
    )  # no sweep: its own point
    assert page.is_hidden("#layers") and page.is_hidden("#saved")


def test_effects_begin_with_the_runs_own_task_and_stay_where_they_were_put(page):
    page.evaluate(
        "D.runs[1].effects.unshift({...D.runs[1].effects[0], task: 'another', says: {kl: 'Of another task.'}})"
    )
    choose(page, "run", "1")
    assert page.input_value("#effect-task") == "synthetic-math" and "Of another" not in page.inner_text("#effect-says")
    choose(page, "effect-task", "another")
    assert "Of another task." in page.inner_text("#effect-says")
    page.click("#theme")
    settle(page)
    assert page.input_value("#effect-task") == "another"
    choose(page, "run", "0")
    assert page.inner_text("#effect-says") == "Because of the test."  # the sweep speaks for itself
    page.evaluate("D.runs[1].effects.shift()")


def test_every_outcome_stands_beside_the_others_and_one_loss_is_chosen(page, document):
    assert page.evaluate("[...$('outcome').options].map(o => o.value)") == ["aligned_loss"]  # as the sweep has it
    choose(page, "run", "1")
    (effects,) = [one for one in document["runs"][1]["effects"] if one["task"] == "synthetic-math"]
    names = [document["outcomes"][field]["name"] for field in effects["fields"]]
    found = traces(page, "outcomes")
    for trace, policy in (("projected", "projected"), ("after SPD, without projection", "spd")):
        assert found[trace]["text"] == names
        assert found[trace]["y"] == [effects[policy][field][0] for field in effects["fields"]]
    assert document["outcomes"]["completion_loss"]["says"] in page.inner_text("#outcomes-list")
    assert page.input_value("#outcome") == effects["decides"]
    choose(page, "outcome", "completion_loss")
    assert traces(page, "loss")["projected"]["y"] == [effects["projected"]["completion_loss"][0]]
    assert page.inner_text("#loss-caption") == "completion loss, change from base"
    assert "change of the completion loss" in page.inner_text("#readouts")
    page.click("#theme")
    settle(page)
    assert page.input_value("#outcome") == "completion_loss"
    choose(page, "run", "0")
    assert page.input_value("#outcome") == "aligned_loss"


def test_measures_of_the_overlap_and_of_the_map(page, document):
    site = page.input_value("#site")
    choose(page, "measure", "cosine")
    rank = int(page.input_value("#rank"))
    z = page.evaluate("document.getElementById('plot-overlap').data[0].z")
    assert z[0][1] == document["overlap"][site]["0"]["cosine"][0][1][rank - 1] and z[0][0] == 1
    maps = {}
    for measure in ("share", "held", "ninety"):
        choose(page, "map-measure", measure)
        maps[measure] = page.evaluate("document.getElementById('plot-map').data[0]")
    row, column = maps["held"]["y"].index("values 0"), maps["held"]["x"].index(site.split(".")[0])
    assert sum(x for line in maps["share"]["z"] for x in line if x is not None) == pytest.approx(1, abs=1e-4)
    energy = document["runs"][0]["blocks"][site]["0"]["energy"]
    assert maps["held"]["z"][row][column] == energy[rank - 1]
    assert maps["ninety"]["z"][row][column] == 1 + next(i for i, x in enumerate(energy) if x >= 0.9)
    totals = [document["runs"][0]["blocks"][s][h]["total"] for s in ("1.k", "1.v", "3.k", "3.v") for h in "01"]
    mine = document["runs"][0]["blocks"][site]["0"]["total"] / sum(totals)
    assert maps["share"]["z"][row][column] == pytest.approx(mine)


def test_a_click_into_the_map_chooses_site_and_head(page):
    before = page.input_value("#site"), page.input_value("#head")
    data = page.evaluate("document.getElementById('plot-map').data[0]")
    clicked = data["customdata"][data["y"].index("keys 1")][data["x"].index("1")]
    page.evaluate(
        "point => document.getElementById('plot-map').emit('plotly_click', {points: [{customdata: point}]})", clicked
    )
    settle(page)
    assert (page.input_value("#site"), page.input_value("#head")) == ("1.k", "1") != before


def test_differences_are_marked_and_not_by_colour_alone(page):
    assert page.locator("#text-list ins").count() and page.locator("#text-list del").count()
    styles = "node => { const s = getComputedStyle(node); return [s.textDecorationLine, s.textDecorationStyle]; }"
    assert page.locator("#text-list ins").first.evaluate(styles) == ["underline", "solid"]
    assert page.locator("#text-list del").first.evaluate(styles) == ["underline", "dashed"]
    choose(page, "text-set", "1")
    assert page.locator("#text-list .card").first.locator(".side").count() == 3
    assert "score" in page.locator("#text-list .card").first.inner_text()


def test_completions_are_searched_and_paged(page):
    assert page.inner_text("#text-place") == "1–3 of 6"
    page.click("#text-next")
    assert page.inner_text("#text-place") == "4–6 of 6" and page.is_disabled("#text-next")
    page.fill("#text-search", "OMEGA")
    assert page.inner_text("#text-place") == "1–1 of 1"
    page.fill("#text-search", "no such text")
    assert "No completion" in page.inner_text("#text-list")


def test_hostile_text_is_shown_as_text(page):
    assert HOSTILE in page.inner_text("#text-list .prompt >> nth=0")
    assert page.locator("#views img").count() == 0
    assert BETA in page.inner_text("h1")
    for plot in ("overlap", "overlap-rank"):  # names of runs are labels of figures
        assert page.locator(f"#plot-{plot} image[href='x']").count() == 0
    assert "onerror" in page.inner_text("#overlap")


def test_light_and_dark(page):
    def look():
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return ground, page.evaluate("document.getElementById('plot-energy').layout.font.color")

    light = look()
    page.emulate_media(color_scheme="dark")
    settle(page)
    dark = look()
    assert dark[0] != light[0] and dark[1] != light[1]
    page.click("#theme")
    settle(page)
    assert look() == light
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    settle(page)
    assert look() == dark


@pytest.mark.parametrize("width", [1280, 768])
def test_fits_the_screen(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(400)
    for id in ("texts", "provenance"):
        page.evaluate(f"document.querySelectorAll('#{id} details').forEach(box => box.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    shot = page.screenshot(full_page=True)
    assert shot.startswith(b"\x89PNG") and len(shot) > 50_000
    for plot in PLOTS:
        box = page.locator(f"#plot-{plot}").bounding_box()
        assert box["width"] > 250 and box["x"] + box["width"] <= width


def test_every_control_has_a_name_and_can_be_reached(page):
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, button")].filter(node => !node.labels?.length
        && !node.getAttribute("aria-label") && !node.textContent.trim()).map(node => node.id)"""
    )
    assert unnamed == []
    reached = set()
    page.focus("#theme")
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"run", "site", "head", "rank", "rank-number"} <= reached


def test_links_lead_to_the_pages_of_saved_analyses(page, written):
    link = page.locator("#saved a").first
    href = link.evaluate("node => node.href")
    assert href == (written.parent / "alpha" / "analysis" / "rank_sweep.html").as_uri()


def test_the_policy_stops_scripts_and_requests_that_slip_in(watch, written):
    watch.page.goto(written.as_uri())
    watch.page.wait_for_selector("html[data-ready=yes]")
    with socket.create_server(("127.0.0.1", 0)) as leak:
        leak.settimeout(0.5)
        watch.page.evaluate(
            """(port) => {
            const script = document.createElement("script"); script.textContent = "window.ran = true";
            const image = new Image(); image.src = `http://127.0.0.1:${port}/leak`;
            document.body.append(script, image);
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = true'>");
            }""",
            leak.getsockname()[1],
        )
        with pytest.raises(TimeoutError):
            leak.accept()
    assert watch.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in error for error in watch.errors)


def test_explore_draws_inside_a_notebooks_frame(watch, finished_run, tmp_path):
    explorer = finished_run.subspace.explore(
        finished_run.moments, others={"random": finished_run.subspace.random_like(1)}
    )
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!DOCTYPE html><meta charset=utf-8>{explorer._repr_html_()}", encoding="utf-8")
    watch.page.goto(notebook.as_uri())
    frame = watch.page.frame_locator("iframe")
    frame.locator("html[data-ready=yes]").wait_for()
    assert frame.locator("#energy-says").inner_text().count("directions hold 90%") == 1
    assert frame.locator("#plot-energy .scatterlayer .trace").count() > 3
    before = frame.locator("#readouts").inner_text()
    frame.locator("#rank").focus()
    watch.page.keyboard.press("Home")
    watch.page.wait_for_timeout(200)
    assert frame.locator("#readouts").inner_text() != before
    assert frame.locator("#texts").is_hidden() and frame.locator("#effect").is_hidden()
    assert watch.errors == [] and not any(url.startswith("http") for url in watch.requests)


def test_a_subspace_alone_shows_its_spectrum_and_angles(watch, finished_run, tmp_path):
    subspace = finished_run.subspace
    watch.page.goto(subspace.explore(others={"same": subspace}).save(tmp_path / "page.html").as_uri())
    watch.page.wait_for_selector("html[data-ready=yes]")
    assert "of the gradient energy kept" in watch.page.inner_text("#readouts")
    choose(watch.page, "measure", "cosine")
    z = watch.page.evaluate("document.getElementById('plot-overlap').data[0].z")
    assert z[0][1] == pytest.approx(1)
    assert watch.errors == []
