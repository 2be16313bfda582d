"""Pages of figures and of heads in a real Chromium: drawn under their policies, in both colours, without a request."""

import pandas as pd

from spd_lens.analysis.common.style import figure, line, page, plain
from spd_lens.analysis.heads.attention import attention_of
from spd_lens.analysis.heads.command import energy_map
from spd_lens.analysis.heads.page import heads_page
from spd_lens.examples import Example

from .conftest import HOSTILE


def opened(watch, tmp_path, html):
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    watch.page.goto(path.as_uri())
    watch.page.wait_for_selector(".js-plotly-plot .main-svg", state="attached", timeout=30_000)
    return watch.page


def inks(page):
    return page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].map(plot => "
        "[plot._fullLayout.font.color, plot._fullLayout.xaxis.gridcolor, plot._fullLayout.xaxis.showgrid])"
    )


def test_figures_are_drawn_in_the_page_s_colours(watch, tmp_path):
    fig = figure("t", "x", "y")
    line(fig, ["a", "b"], [3, 4], plain(HOSTILE))
    view = opened(watch, tmp_path, page(HOSTILE, [fig], says=HOSTILE, facts={"run": HOSTILE}))
    assert view.locator(".scatterlayer .trace").count() == 1 and view.locator("main img").count() == 0
    light = inks(view)
    view.emulate_media(color_scheme="dark")
    view.wait_for_timeout(200)
    dark = inks(view)
    assert light[0][0] != dark[0][0] and light[0][1] != dark[0][1]
    assert watch.errors == [] and len(watch.requests) == 1


def test_heads_are_chosen_by_their_selectors(watch, tmp_path, tiny_pair):
    examples = [Example(f"{HOSTILE} and so", "12", ((0, 2),), id=HOSTILE)]
    energy = pd.DataFrame(
        [
            {"site": f"{layer}.{kind}", "layer": layer, "kind": kind, "head": str(head), "value": value,
             "uniform": 0.25, "low": value, "high": value}
            for kind in "kv" for layer, head, value in ((1, 0, 0.1), (1, 1, 0.2), (3, 0, 0.3), (3, 1, 0.4))
        ]
    )  # fmt: skip
    shown = attention_of(tiny_pair, examples, kinds=("k", "v"))
    view = opened(watch, tmp_path, heads_page("Heads", [energy_map(energy)], shown, says="s", facts={"n": 1}))
    assert view.inner_text("#chosen") == "Layer 3, keys, KV head 1"
    before = view.inner_text("#texts")
    view.select_option("#kind", "v")
    view.select_option("#head", "0")
    assert view.inner_text("#chosen") == "Layer 3, values, KV head 0" and view.inner_text("#texts") != before
    assert HOSTILE in view.inner_text("#explain") and view.locator("main img").count() == 0
    assert view.locator("#patterns .heatmaplayer image").count() == 2
    assert watch.errors == [] and len(watch.requests) == 1
