"""Which sites are meant."""

import pytest

from spd_lens.sites import Site, resolve_layers, resolve_sites
from tests.helpers import refused


def test_sites_are_named_as_transformer_lens_names_them():
    assert Site(11, "k").hook_name == "blocks.11.attn.hook_k"
    assert str(Site(11, "v")) == "11.v"
    assert Site.parse("11.v") == Site(11, "v")
    assert sorted([Site(3, "v"), Site(1, "v"), Site(3, "k")]) == [Site(1, "v"), Site(3, "k"), Site(3, "v")]


@pytest.mark.parametrize(("n_layers", "blocks"), [(30, [14, 29]), (24, [11, 23]), (7, [2, 6]), (2, [0, 1]), (1, [0])])
def test_the_papers_layers_are_the_last_and_the_middle_one(n_layers, blocks):
    """{L, floor(L / 2)} counted from 1."""
    assert resolve_layers("last_mid", n_layers) == blocks


@pytest.mark.parametrize(("n_layers", "blocks"), [(30, [15, 29]), (24, [12, 23]), (7, [3, 6]), (2, [1]), (1, [0])])
def test_the_reference_code_counts_the_middle_one_from_0(n_layers, blocks):
    """Blocks n - 1 and n // 2, counted from 0: 23 and 12 of 24."""
    assert resolve_layers("last_mid_from_0", n_layers) == blocks


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("all", [0, 1, 2, 3]), (2, [2]), ([3, 1, 3], [1, 3]), ("3,0", [0, 3]), ("2", [2]), (range(2), [0, 1])],
)
def test_layers(layers, blocks):
    assert resolve_layers(layers, 4) == blocks


@pytest.mark.parametrize("layers", ["middle", "1,x", "", "-1", 4, -1, [0, 4], [], "4", True, [1.0], ["1"], "²"])
def test_layers_that_do_not_exist(layers):
    with refused("layer"):
        resolve_layers(layers, 4)


def test_what_is_said_of_wrong_layers_and_kinds():
    with refused("layer 4", "0 to 3"):
        resolve_layers([0, 4], 4)
    with refused("'middle'", "last_mid", "last_mid_from_0", "all"):
        resolve_layers("middle", 4)
    with refused("no layer", "last_mid_from_0"):
        resolve_layers([], 4)
    with refused("'x'", "k, v, q"):
        resolve_sites("all", ("k", "x"), 4)
    with refused("kind"):
        resolve_sites("all", (), 4)
    for text in ("k", "x.k", "-1.k"):
        with refused(repr(text), "'11.k'"):
            Site.parse(text)
    with refused("'mlp'"):
        Site.parse("11.mlp")
    with refused("unknown kind ''"):
        Site.parse("11")


def test_kinds_keep_the_order_they_were_given_in():
    assert resolve_sites([1, 0], "v, k,v", 4) == [Site(0, "v"), Site(0, "k"), Site(1, "v"), Site(1, "k")]
