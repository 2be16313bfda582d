"""Methods are found by name, and a user's own beside them."""

from __future__ import annotations

import copy
import sys

import pytest

from spd_lens import estimators, methods
from spd_lens.methods import registry
from spd_lens.methods.base import Method
from spd_lens.subspaces.policy import Policy
from tests.helpers import refused

OWN = '''
"""A method of a user's own: the complement of two thirds of the rank, sampled hot."""
from spd_lens.methods import Method, register
from spd_lens.evaluation import Policy


@register
class Mine(Method):
    name = "mine"
    says = "hot samples under what the gradients leave out"
    is_control = True

    def projection(self, experiment):
        return Policy("mine", ~experiment.subspace(), 0.5)

    def sampling(self, experiment):
        return {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
'''


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    methods.names()
    monkeypatch.setattr(registry, "_METHODS", copy.copy(registry._METHODS))


def test_all_methods_are_found_the_paper_first():
    found = methods.names()
    estimated = {f"spd-{name}" for name in estimators.names()}
    plain = [name for name in found if name not in estimated]
    assert plain[:7] == ["base", "psr", "psr-reference", "spd", "ssd", "ssd-config", "ssd-reference"]
    controls = {
        "spd-random", "spd-random-kl", "spd-random-energy", "spd-shuffled", "spd-complement", "spd-full-loss",
        "spd-activation-pca", "spd-k-only", "spd-v-only",
    }  # fmt: skip
    assert set(plain[7:]) | {"spd-random"} >= controls
    for name in found:
        method = methods.get(name)
        assert method.name == name and method.says and method.is_control == (name in controls)


def test_an_unknown_method_is_refused_with_the_names():
    with refused("spdd", "spd-random", "psr"):
        methods.get("spdd")


def test_a_method_in_a_module_of_its_own_registers_and_works(own_registry, tmp_path, monkeypatch, experiment):
    (tmp_path / "my_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    import my_methods

    assert "mine" in methods.names()[7:]
    found = methods.get("mine").projection(experiment)
    assert isinstance(methods.get("mine"), my_methods.Mine)
    assert found.strength == 0.5 and found.subspace.ranks == {
        site: tuple(8 - rank for rank in ranks) for site, ranks in experiment.subspace().ranks.items()
    }


def test_a_method_of_an_earlier_version_works(experiment):
    from spd_lens.methods.base import Projection

    found = Projection(experiment.subspace(), strength=0.5)
    assert isinstance(found, Policy) and found.strength == 0.5 and found.adapter is None
    assert found.subspace.sites == experiment.subspace().sites


def test_a_name_is_taken_once(own_registry):
    for name in ("spd", "ssd-config", "base"):
        with refused(name, "another name"):
            methods.register(type("Other", (Method,), {"name": name, "says": "x"}))
    first = methods.register(type("First", (Method,), {"name": "new", "says": "x"}))
    assert methods.register(first) is first  # a notebook cell that is run again
    with refused("new", "another name"):
        methods.register(type("Second", (Method,), {"name": "new", "says": "x"}))
    assert type(methods.get("new")) is first


@pytest.mark.parametrize("name", [None, "", "a/b", "../spd", "two words", 3])
def test_a_name_that_no_folder_can_have_is_refused(own_registry, name):
    with refused("Nameless"):
        methods.register(type("Nameless", (Method,), {"name": name, "says": "x"}))
    with refused("Nameless"):
        methods.register(type("Nameless", (Method,), {"says": "x"}))
