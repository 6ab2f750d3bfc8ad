"""Microbatches: how a batch is split, what each part weighs, and how results are joined."""

from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import evenflow
from evenflow.errors import ConfigError
from evenflow.pipe.given.splitter import Splitter
from evenflow.runtime.recorded.joining import join
from evenflow.runtime.recorded.microbatch import Microbatches, batch_size, count, split
from evenflow.runtime.recorded.weights import Weight, shares_of
from unsplit import mlp, regression


def rows(num: int) -> torch.Tensor:
    return torch.arange(2.0 * num).view(num, 2)


BATCHES = {
    "tensor": rows,
    "tuple": lambda n: (rows(n), rows(n)[:, 0]),
    "list": lambda n: [rows(n), "text", None],
    "dict": lambda n: {"x": rows(n), "scale": 0.5, "flag": True},
    "nested": lambda n: {"a": [rows(n), {"b": (rows(n), 3)}], "c": torch.tensor(2.0)},
}


@given(st.sampled_from(list(BATCHES)), st.integers(1, 20), st.integers(1, 20))
def test_parts_put_together_are_the_batch(kind, size, num):
    if num > size:
        return
    batch = BATCHES[kind](size)
    items = split(batch, num)
    sizes = [batch_size(item) for item in items]
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1
    leaves, spec = pytree.tree_flatten(batch)
    assert all(pytree.tree_structure(item) == spec for item in items)
    for at, leaf in enumerate(leaves):
        parts = [pytree.tree_leaves(item)[at] for item in items]
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            assert torch.equal(torch.cat(parts), leaf)
        else:
            assert all(part is leaf for part in parts)


@given(st.integers(1, 30), st.integers(1, 12))
def test_microbatch_size_fills_every_one_but_the_last(size, microbatch_size):
    num = count(size, num_microbatches=None, microbatch_size=microbatch_size, num_ranks=2)
    sizes = [len(item) for item in split(rows(size), num, microbatch_size=microbatch_size)]
    assert sizes[:-1] == [microbatch_size] * (num - 1)
    assert 1 <= sizes[-1] <= microbatch_size
    assert sum(sizes) == size


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_shares_are_those_of_the_rows(sizes):
    found = shares_of([Weight("items", (size,), size) for size in sizes])
    assert found.losses == found.means == tuple(size / sum(sizes) for size in sizes)
    assert found.size == sum(sizes)


@pytest.mark.parametrize(
    ("size", "num_ranks", "expected"),
    [(16, 1, 4), (16, 2, 8), (16, 4, 16), (7, 2, 7), (11, 2, 1), (1, 4, 1)],
)
def test_by_default_up_to_four_for_each_rank(size, num_ranks, expected):
    assert count(size, num_microbatches=None, microbatch_size=None, num_ranks=num_ranks) == expected


def test_one_tensor_in_two_places_stays_one():
    x = rows(4)
    first, _ = split({"x": x, "same": x}, 2)
    assert first["x"] is first["same"]


def test_scalars_have_no_rows():
    assert batch_size({"x": rows(3), "scale": torch.tensor(1.0)}) == 3


def splitter(**options) -> Splitter:
    return Splitter(
        **({"num_ranks": 2, "num_microbatches": None, "microbatch_size": None, "split_batch": None} | options)
    )


def test_a_list_of_microbatches_is_taken_as_it_is():
    items = [{"x": rows(3)}, {"x": rows(1)}]
    prepared = splitter(num_microbatches=7)(Microbatches(items))
    assert all(mine is given for mine, given in zip(prepared.items, items, strict=True))


def test_split_batch_decides():
    prepared = splitter(split_batch=lambda text: text.split())("one two three")
    assert list(prepared.items) == ["one", "two", "three"]


# -- joining


@pytest.mark.parametrize(
    ("trees", "joined"),
    [
        ([1.0, 3.0], 1.5),  # weighted: a quarter of the way
        ([1, 3], 4),
        (["a", "a"], "a"),
        (["a", "b"], ["a", "b"]),
        ([True, True], True),
        ([True, False], [True, False]),
        ([None, None], None),
        ([{"a": 2.0, "b": [1]}, {"a": 4.0, "b": [2]}], {"a": 2.5, "b": [3]}),
        ([[1], [1, 2]], [[1], [1, 2]]),
    ],
)
def test_plain_values(trees, joined):
    assert join(trees, [0.75, 0.25]) == joined


@pytest.mark.parametrize(
    ("trees", "joined"),
    [
        ([torch.zeros(3, 2), torch.ones(1, 2)], torch.tensor([[0.0, 0], [0, 0], [0, 0], [1, 1]])),
        ([torch.tensor(1.0), torch.tensor(3.0)], torch.tensor(1.5)),
        ([torch.tensor(1), torch.tensor(3)], torch.tensor(4)),
        ([torch.tensor(False), torch.tensor(True)], torch.tensor(True)),
    ],
)
def test_tensors(trees, joined):
    assert torch.equal(join(trees, [0.75, 0.25]), joined)


def test_a_single_one_comes_back_as_it_is():
    metrics = {"x": object(), "y": [torch.zeros(2), {1, 2}]}
    assert join([metrics], [1.0]) is metrics


def test_sizes_that_disagree_are_named():
    with pytest.raises(ConfigError, match=r"\['x'\] has 3, \['y'\] has 2"):
        batch_size({"x": rows(3), "y": rows(2)})


def test_a_numpy_array_with_a_row_for_each_is_refused():
    with pytest.raises(ConfigError, match=r"\['y'\] is a numpy array with 4 rows.*torch.from_numpy"):
        split({"x": rows(4), "y": np.zeros((4, 1))}, 2)
    first, second = split({"x": rows(4), "scales": np.ones(3)}, 2)
    assert first["scales"] is second["scales"]


class Encoding(UserDict):
    """As transformers' `BatchEncoding`, which its tokenizers and collators return."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def test_a_mapping_of_the_users_is_split_like_a_dict():
    batch = Encoding(x=rows(4), num_items_in_batch=7)
    items = Splitter(1, 2, None, None)(batch).items
    assert [type(item) for item in items] == [Encoding, Encoding]
    assert torch.equal(torch.cat([item.x for item in items]), batch["x"])
    assert [int(item["num_items_in_batch"]) for item in items] == [7, 7]


@pytest.mark.parametrize("given", [lambda batch: batch, lambda batch: Microbatches([batch, batch])])
def test_a_mapping_of_the_users_is_trained_on(given):
    def loss(model, batch):
        return torch.nn.functional.mse_loss(model(batch["x"]), batch.y)

    batch = given(Encoding(regression()))
    pipe = evenflow.pipeline(mlp(4, 8, 1), loss=loss, example=batch, stages=2, num_microbatches=2)
    assert pipe.check(batch).equal
