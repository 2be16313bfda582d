"""Classes by name: each name is taken once, an unknown one is refused, and tasks and methods go by the same rule."""

import dataclasses

import pytest

from spd_lens import tasks
from spd_lens.methods import registry as methods
from spd_lens.registry import Registry
from spd_lens.tasks import registry as task_registry
from tests.helpers import refused


def named(name, class_name="One"):
    return type(class_name, (), {"name": name})


@pytest.fixture
def shapes():
    return Registry("shape", "there is no shape {name}{guess}; there are {names}")


def test_what_is_added_is_found(shapes):
    circle = named("circle")
    shapes.add(circle)
    assert shapes.find("circle", ["circle"]) is circle


def test_a_name_is_taken_once(shapes):
    first = named("circle")
    shapes.add(first)
    shapes.add(again := named("circle"))  # the same class once more, as when a cell of a notebook is run again
    with refused("shape", "'circle'", "another name"):
        shapes.add(named("circle", "Two"))
    assert shapes["circle"] is again


def test_an_unknown_name_is_one_sentence_with_a_guess(shapes):
    shapes.add(named("circle"))
    with refused("there is no shape 'circel' (did you mean 'circle'?); there are circle"):
        shapes.find("circel", ["circle"])
    with refused("there is no shape 'x'; there are circle"):
        shapes.find("x", ["circle"])


def test_tasks_and_methods_are_registries():
    assert isinstance(task_registry._TASKS, Registry) and isinstance(methods._METHODS, Registry)


def test_a_task_of_ones_own_does_not_replace_one_of_ours():
    ours = type(tasks.get("synthetic-math"))
    mine = dataclasses.dataclass(kw_only=True)(type("Mine", (ours,), {"name": "synthetic-math"}))
    with refused("task", "'synthetic-math'", "another name"):
        tasks.register(mine)
    assert type(tasks.get("synthetic-math")) is ours
