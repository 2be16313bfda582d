"""Which cells a grid has, and what a cell's subspace does."""

import re
from pathlib import Path

import pytest
import torch

from spd_lens import extract
from spd_lens.analysis.sweeps.grid import Grid, GridCell
from spd_lens.errors import SPDError
from spd_lens.sites import Site
from tests.helpers import EXAMPLES

DOC = Path(__file__).parents[2] / "docs" / "ablation.md"


@pytest.fixture(scope="module")
def moments(tiny_pair):
    """All four layers: 2 heads of 8 dimensions."""
    return extract(tiny_pair, EXAMPLES, layers="all", shards=2, progress=False)


def places(cells):
    return sorted({(cell.layers, tuple(sorted({site.layer for site in cell.sites}))) for cell in cells})


def test_cells_are_all_combinations(moments):
    grid = Grid(ranks=[2, 0.5], layers=["1", "last_mid"], kinds=["kv", "v"], projectors=["per_head", "joint"])
    cells = grid.cells(moments)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2 * 2
    assert {(c.rank, c.width) for c in cells if c.projector == "joint"} == {(2, 16), (8, 16)}
    assert {(c.rank, c.width) for c in cells if c.projector == "per_head"} == {(2, 8), (4, 8)}
    assert {tuple(map(str, c.sites)) for c in cells if c.layers == "1"} == {("1.k", "1.v"), ("1.v",)}


def test_sets_of_layers(moments):
    grid = Grid(ranks=[2], layers=["each/2", "first_third", "last_third", "all", [0, 2]])
    assert dict(places(grid.cells(moments))) == {
        "1": (1,),
        "3": (3,),
        "first_third": (0,),
        "last_third": (2, 3),
        "all": (0, 1, 2, 3),
        "0,2": (0, 2),
    }


def test_the_same_sites_are_one_cell_and_full_rank_is_none(moments):
    cells = Grid(ranks=[4, 0.5, 8, 1.0], layers=["last_mid", "1,3"], kinds=["kv", "k+v"]).cells(moments)
    assert [(c.layers, c.rank) for c in cells] == [("last_mid", 4)]


def test_cells_that_begin_late_come_first(moments):
    cells = Grid(ranks=[2], layers=["all", "each"]).cells(moments)
    assert [cell.first_layer for cell in cells] == [3, 2, 1, 0, 0]


def test_one_head_alone(moments):
    cells = Grid(ranks=[3], layers=["3"], kinds=["k"], heads=["each", "all"]).cells(moments)
    assert [cell.head for cell in cells] == ["0", "1", "all"]
    cell, x, site = cells[1], torch.randn(5, 2, 8), Site(3, "k")
    subspace = cell.subspace(moments)
    assert subspace.ranks[site] == (8, 3)
    projector = moments.subspace(3, sites=[site]).projector(site)[1].float()
    torch.testing.assert_close(subspace(x, site)[:, 0], x[:, 0])
    torch.testing.assert_close(subspace(x, site)[:, 1], x[:, 1] @ projector)
    random = subspace.random_like(0)
    torch.testing.assert_close(random(x, site)[:, 0], x[:, 0], msg="the control touched the other head")
    assert not torch.allclose(random(x, site)[:, 1], x[:, 1] @ projector, atol=1e-2)


def test_names_do_not_depend_on_spelling():
    sites = tuple(Site(layer, "k") for layer in (0, 1, 2))
    assert GridCell("first_third", sites, "k", "all", "joint", 4, 16).name == "L0-2.k.all.joint.r4"
    assert GridCell("0,1,2", sites, "k", "all", "joint", 4, 16).name == "L0-2.k.all.joint.r4"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ranks": [0]}, "rank 0"),
        ({"ranks": [1.5]}, "rank 1.5"),
        ({"ranks": ["half"]}, "half"),
        ({"ranks": []}, "ranks"),
        ({"rank": [4]}, "unknown setting 'rank'"),
        ({"kinds": ["w"]}, "'w'"),
        ({"heads": ["first"]}, "'first'"),
        ({"projectors": ["both"]}, "'both'"),
        ({"n_random": 2}, "n_random = 2"),
        ({"n_items": 1}, "n_items = 1"),
    ],
)
def test_settings_that_cannot_be(settings, named):
    with pytest.raises(SPDError, match=re.escape(named)) as refusal:
        Grid.make(settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers": ["9"]}, "layer 9"),
        ({"layers": ["middle"]}, "'middle'"),
        ({"layers": ["each/0"]}, "'each/0'"),
        ({"kinds": ["q"]}, "site 0.q"),
        ({"ranks": [9]}, "rank 9"),
        ({"heads": ["2"]}, "head 2"),
        ({"ranks": [1.0]}, "full ranks"),
    ],
)
def test_grids_that_the_moments_do_not_have(moments, settings, named):
    with pytest.raises(SPDError, match=re.escape(named)) as refusal:
        Grid.make({"layers": ["all"], "ranks": [2], **settings}).cells(moments)
    assert "\n" not in str(refusal.value)


def test_yaml_over_defaults_and_options_over_yaml(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("ranks: [4, 0.5]\nlayers: last_mid\nn_items: 10\n")
    grid = Grid.read(path, {"projectors": ["joint"], "n_items": 5}, n_items=7, n_random=None)
    assert (grid.ranks, grid.layers, grid.projectors, grid.n_items) == ([4, 0.5], ["last_mid"], ["joint"], 7)
    assert isinstance(grid.ranks[0], int) and isinstance(grid.ranks[1], float)
    assert Grid.read(None) == Grid()


def test_the_documented_grid_is_one(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, "docs/ablation.md shows no grid"
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        assert Grid.read(path).layers
