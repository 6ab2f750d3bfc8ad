"""Positions: where a cut changes nothing, what crosses each, and where another recording is cut."""

import pytest
import torch
from test_cut import WIDTH, at, graph_of, skipping
from torch import nn
from torch.utils.checkpoint import checkpoint

from evenflow.errors import RecordError
from evenflow.graph.cutting.cut import cut
from evenflow.graph.cutting.positions import crossing_bytes, legal_positions, num_bytes, positions_for_owners
from evenflow.graph.nouns.graph import Graph
from unsplit import mean_square, mlp


def parted(graph: Graph, first: str, last: str) -> bool:
    """Whether any cut may part two nodes."""
    return any(legal_positions(graph)[at(graph, first) + 1 : at(graph, last) + 1])


def test_a_straight_chain_may_be_cut_anywhere():
    graph = graph_of(skipping)
    assert all(legal_positions(graph))


def test_a_cut_never_parts_a_change_from_an_alias_that_matters():
    def program(model, batch):
        h = model["a"](batch["x"]) * 1.0
        view = h[0]
        y = model["b"](batch["x"])
        h.add_(y)
        return (model["c"](h) + view).mean()

    graph = graph_of(program)
    assert not parted(graph, "__getitem__", "add_")
    assert legal_positions(graph)[1], "before there is an alias"


def test_a_cut_never_parts_a_change_that_autograd_is_not_told_of_from_earlier_users():
    def program(model, batch):
        h = model["a"](batch["x"])
        y = model["b"](h)
        y = model["c"](y)
        h.data.mul_(2)
        return (model["d"](h) + y).mean()

    graph = graph_of(program)
    assert not parted(graph, "a", "mul_")
    assert legal_positions(graph)[at(graph, "d")]


def test_a_cut_never_parts_one_tensor_under_two_numbers():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            same = x.contiguous()  # outside of this module it goes by its earlier number
            return self.layer(same) * same

    def program(model, batch):
        h = model["a"](batch["x"])
        return (model["inner"](h) + model["b"](h)).mean()

    model = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "inner": Inner(), "b": nn.Linear(WIDTH, WIDTH)})
    graph = graph_of(program, model)
    assert not parted(graph, "inner:contiguous", "inner:mul")
    assert legal_positions(graph)[at(graph, "inner:contiguous")]
    assert legal_positions(graph)[at(graph, "b")]


def test_a_cut_never_parts_a_checkpoint_where_it_changes_what_it_made():
    def program(model, batch):
        def part(h):
            k = model["b"](h) * 1.0
            y = model["c"](h)
            return k.mul_(2) * y

        return model["d"](checkpoint(part, model["a"](batch["x"]), use_reentrant=False)).mean()

    graph = graph_of(program)
    assert not parted(graph, "mul", "mul_")
    assert legal_positions(graph)[at(graph, "b")]
    assert legal_positions(graph)[at(graph, "d")]


def test_a_cut_never_parts_the_users_of_an_object_that_is_changed():
    class Counting(nn.Module):
        def forward(self, x, counter):
            counter.calls += 1
            return x * counter.calls

    def program(model, batch):
        counter = Counter()
        h = model["first"](model["a"](batch["x"]), counter)
        return model["second"](model["b"](h), counter).mean()

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in "ab"}
    model = nn.ModuleDict(layers | {"first": Counting(), "second": Counting()})
    graph = graph_of(program, model, max_share=1.0)
    assert not parted(graph, "first", "second")
    assert legal_positions(graph)[at(graph, "first")]


class Counter:
    calls = 0


def test_a_cut_never_parts_the_users_of_a_buffer_that_is_changed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(WIDTH, WIDTH, WIDTH, 1)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            x = self.layers[0](x) + self.calls
            x = self.layers[2](self.layers[1](x))
            self.calls += 1
            return self.layers[4](self.layers[3](x + self.calls))

    graph = graph_of(mean_square, Model())
    legal = legal_positions(graph)
    first, change, copied = at(graph, "add"), at(graph, "add_"), at(graph, "calls (copied)")
    assert not any(legal[first + 1 : change + 1])
    assert legal[first]
    assert change < copied, "what reads it later takes a copy"
    assert not legal[copied]
    assert all(legal[copied + 1 :])


def test_crossing_bytes_are_those_of_the_values_alive():
    graph = graph_of(skipping)
    size = 4 * WIDTH * 4
    crossing = crossing_bytes(graph)
    assert crossing[0] == 0
    assert crossing[at(graph, "b")] == size
    assert crossing[at(graph, "d")] == 2 * size
    assert num_bytes(graph.values[graph.chain[0].results[0]].info) == size


# -- again, for the owners that are


def test_another_recording_is_cut_where_its_parameters_live():
    graph = graph_of(skipping)
    owners = {f"{name}.{kind}": stage for stage, name in enumerate("abcd") for kind in ("weight", "bias")}
    positions = positions_for_owners(graph, owners, 4)
    for stage, section in enumerate(cut(graph, positions).sections):
        names = {name for node in section.nodes for name in node.parameters}
        assert {owners[name] for name in names} == {stage}


def test_a_stage_that_a_recording_does_not_use_stays_empty():
    graph = graph_of(lambda model, batch: model["d"](model["a"](batch["x"])).mean())
    owners = {f"{name}.{kind}": stage for stage, name in enumerate("abcd") for kind in ("weight", "bias")}
    sections = cut(graph, positions_for_owners(graph, owners, 4)).sections
    assert [bool(section.nodes) for section in sections] == [True, False, False, True]


def test_another_recording_is_cut_at_a_legal_place_between_owners():
    def program(model, batch):
        h = model["a"](batch["x"]) * 2
        part = h[:1]
        k = model["b"](h)
        part.add_(1)
        return (k + h).mean()

    graph = graph_of(program)
    assert not legal_positions(graph)[at(graph, "b")]
    assert positions_for_owners(graph, {"a.weight": 0, "b.weight": 1}, 2) == (at(graph, "__getitem__"),)


def test_owners_that_no_legal_place_parts_are_refused():
    def program(model, batch):
        h = model["c"](batch["x"])
        part = h[:1]
        k = model["b"](h) + model["a"](h)
        part.add_(1)
        return (k + h).mean()

    graph = graph_of(program)
    with pytest.raises(RecordError, match="a begins stage 1, but between stages 0 and 1 is no place to cut"):
        positions_for_owners(graph, {"b.weight": 0, "a.weight": 1}, 2)


def test_each_use_of_a_shared_parameter_stays_on_its_stage():
    def program(model, batch):
        h = model["b"](model["a"](batch["x"]))
        return model["c"](model["a"](h)).mean()

    graph = graph_of(program)
    uses = {("a.weight", 0): 0, ("a.weight", 1): 1}
    assert positions_for_owners(graph, {"c.weight": 1}, 2, uses) == (2,)
    with pytest.raises(
        RecordError, match=r"a is use number 2 of the shared parameter a\.weight, .* stage 0 before"
    ):
        positions_for_owners(graph, {"b.weight": 1}, 2, {("a.weight", 1): 0})


def test_an_order_that_no_cut_follows_is_refused():
    graph = graph_of(lambda model, batch: model["a"](model["b"](batch["x"])).mean())
    with pytest.raises(RecordError, match=r"^for this batch a runs after parameters of stage 1 but owns"):
        positions_for_owners(graph, {"a.weight": 0, "a.bias": 0, "b.weight": 1, "b.bias": 1}, 2)
