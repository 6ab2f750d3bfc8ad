"""`Joining`: microbatches' metrics as the user says, for all of them or by name."""

import re

import pytest
import torch

from evenflow.errors import ConfigError
from evenflow.runtime.recorded.joining import Joining

HALVES = [0.75, 0.25]


def refused(text):
    return pytest.raises(ConfigError, match=f"^{re.escape(text)}")


@pytest.mark.parametrize(
    ("way", "expected"), [("mean", 2.5), ("sum", 6.0), ("max", 4.0), ("min", 2.0), (list, [2.0, 4.0])]
)
def test_plain_numbers(way, expected):
    assert Joining.of(way)([2.0, 4.0], HALVES) == expected


@pytest.mark.parametrize(
    ("way", "expected"),
    [("mean", [1.5, 2.5]), ("sum", [4, 6]), ("max", [3, 4]), ("min", [1, 2]), ("cat", [1, 2, 3, 4])],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_tensors_with_dimensions(way, expected, dtype):
    found = Joining.of(way)([torch.tensor([1, 2], dtype=dtype), torch.tensor([3, 4], dtype=dtype)], HALVES)
    assert found.tolist() == expected
    assert found.dtype == (torch.float32 if way == "mean" else dtype)


def test_scalars_are_concatenated_into_one_tensor_also_of_a_single_microbatch():
    join = Joining.of("cat")
    assert torch.equal(join([torch.tensor(1.0), torch.tensor(2.0)], HALVES), torch.tensor([1.0, 2.0]))
    assert torch.equal(join([torch.tensor(1.0)], [1.0]), torch.tensor([1.0]))
    assert join([3], [1.0]) == [3]


def test_each_name_has_its_way_and_the_rest_the_usual_one():
    trees = [
        {"a": {"x": x, "y": y}, "b": torch.tensor(b), "c": "k"} for x, y, b in ((1, 2, 2.0), (5, 1, 4.0))
    ]
    found = Joining.of({"a": "max"})(trees, HALVES)
    assert found == {"a": {"x": 5, "y": 2}, "b": torch.tensor(2.5), "c": "k"}


def test_places_of_a_tuple_are_names_too():
    assert Joining.of({1: "max"})([(1, 2), (3, 7)], HALVES) == (4, 7)


def test_what_weighs_nothing_is_left_out_of_a_mean():
    assert Joining.of("mean")([float("nan"), 3.0], [0.0, 1.0]) == 3.0


def test_none_stays_none():
    assert Joining.of("sum")([{"a": None}, {"a": None}], HALVES) == {"a": None}


def test_a_way_that_there_is_not():
    with refused("metrics='average', which is none of 'mean', 'sum', 'max', 'min', 'cat', and no function"):
        Joining.of("average")
    with refused("metrics= says 3 for 'acc', which is none of"):
        Joining.of({"acc": 3})


def test_a_name_that_the_metrics_do_not_have():
    text = "metrics= names 'acc', which the loss function's metrics do not have; they have 'correct', 'n'"
    with refused(text):
        Joining.of({"acc": "sum"}).check({"correct": 1, "n": 2}, lambda _: False)


def test_a_leaf_that_has_no_sum():
    with refused("metrics= says 'sum' for ['kind'], which is a str; give 'cat', or a function"):
        Joining.of("sum").check({"kind": "a"}, lambda _: False)
    Joining.of("sum").check({"kind": "stands for a tensor", "none": None}, lambda leaf: leaf is not None)
    Joining.of({"kind": "cat"}).check({"kind": "a"}, lambda _: False)


def test_shapes_that_differ():
    with refused("metrics= says 'mean' for ['p'], whose shapes differ between microbatches ((3, 2), (2, 2))"):
        Joining.of("mean")([{"p": torch.ones(3, 2)}, {"p": torch.ones(2, 2)}], HALVES)


def test_forms_that_differ():
    with refused("metrics= says how to put the microbatches' metrics together, but they differ in form"):
        Joining.of("sum")([{"a": 1}, {"b": 1}], HALVES)
