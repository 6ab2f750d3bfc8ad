"""Cutting: what travels between stages, what is computed again, and where a cut is illegal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evenflow.errors import RecordError
from evenflow.graph.cut import Cut, cut
from evenflow.graph.fakes import FakeParameters
from evenflow.graph.graph import Graph
from evenflow.graph.leaves import flatten
from evenflow.graph.positions import crossing_bytes, legal_positions, num_bytes, positions_for_owners
from evenflow.graph.record import record
from evenflow.graph.tree import BatchLeaf, ParameterSource
from unsplit import mean_square, mlp, regression

WIDTH = 4


def graph_of(program, model: nn.Module | None = None) -> Graph:
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "abcd"}) if model is None else model
    fakes = FakeParameters(model, torch.device("cpu"))
    batch = regression(4, WIDTH)
    return flatten(record(program, model, batch, device=torch.device("cpu"), fakes=fakes), max_share=0.0)


def straight(model, batch):
    x = batch["x"]
    for name in "abcd":
        x = model[name](x)
    return x.mean()


def skipping(model, batch):
    """The result of a is used by b, c and d."""
    h = model["a"](batch["x"])
    y = model["b"](h)
    z = model["c"](y * h)
    return (model["d"](z) + h).mean()


def with_mask(model, batch):
    mask = (batch["x"] > 0).float() * 2
    h = model["a"](batch["x"])
    h = model["b"](h) * mask
    return (model["c"](h) * mask).mean()


def changing(model, batch):
    h = model["a"](batch["x"]) * 1.0
    view = h[0]
    y = model["b"](batch["x"])
    h.add_(y)
    return (model["c"](h) + view).mean()


def at(graph: Graph, name: str) -> int:
    return next(i for i, node in enumerate(graph.chain) if node.name == name)


# -- what travels


def test_a_straight_chain_sends_one_value_to_the_next():
    graph = graph_of(straight)
    made = cut(graph, [1, 2, 3])
    for stage, section in enumerate(made.sections):
        assert section.nodes[0].name == "abcd"[stage]
        assert {target: len(values) for target, values in section.sends.items()} == (
            {stage + 1: 1} if stage < 3 else {}
        )
        assert section.needs_output == (stage == 3)
    assert made.flow.activations == {(0, 1), (1, 2), (2, 3)}
    assert made.flow.gradients == {(1, 0), (2, 1), (3, 2)}


def test_a_value_goes_straight_to_its_users_and_its_gradient_is_relayed_back():
    graph = graph_of(skipping)
    made = cut(graph, [at(graph, "b"), at(graph, "c"), at(graph, "d")])
    (h,) = graph.chain[0].results
    assert made.sections[0].sends[1] == (h,)
    assert h in made.sections[0].sends[3]
    assert made.flow.activations == {(0, 1), (0, 3), (1, 2), (2, 3)}
    assert made.flow.gradients == {(3, 1), (1, 0), (2, 1), (3, 2)}
    assert made.sections[1].relayed == {h}
    assert h in made.sections[3].gradient_sends[1]
    assert made.sections[1].gradient_sends[0] == (h,)


def test_what_depends_on_the_batch_alone_is_computed_again_and_never_sent():
    graph = graph_of(with_mask)
    made = cut(graph, [1, at(graph, "c")])
    assert made.flow.activations == {(0, 1), (1, 2)}
    for section in made.sections[1:]:
        assert {"gt", "float", "mul"} <= {node.name for node in section.nodes}
        assert [leaf for leaf, _ in section.batch] == [0]


def test_a_batch_value_that_is_changed_is_copied_first():
    def program(model, batch):
        batch["x"] += 1
        return straight(model, batch)

    graph = graph_of(program)
    (section,) = cut(graph, []).sections
    assert {graph.values[value].source for value in section.cloned} == {BatchLeaf(0)}


def test_a_value_without_a_gradient_has_no_way_back():
    def program(model, batch):
        h = model["a"](batch["x"])
        return (model["b"](h.detach()) + model["c"](h)).mean()

    graph = graph_of(program)
    made = cut(graph, [at(graph, "b")])
    sent = [graph.values[value] for value in made.sections[0].sends[1]]
    assert sorted(value.info.requires_grad for value in sent) == [False, True]
    assert len(made.sections[1].gradient_sends[0]) == 1


def test_equal_positions_leave_a_stage_empty():
    made = cut(graph_of(straight), [2, 2])
    assert made.sections[1].nodes == ()
    assert made.flow.activations == {(0, 2)}


@pytest.mark.parametrize("program", [straight, skipping, with_mask])
@settings(max_examples=30)
@given(data=st.data())
def test_every_cut_is_complete(program, data):
    graph = GRAPHS[program]
    places = [c for c in range(1, len(graph.chain)) if legal_positions(graph)[c]]
    positions = sorted(data.draw(st.sets(st.sampled_from(places), max_size=3)))
    assert_complete(cut(graph, positions))


GRAPHS = {program: graph_of(program) for program in (straight, skipping, with_mask)}


def assert_complete(made: Cut) -> None:
    """Every node runs once (glue where it is needed), on values that are there; all ends of traffic meet."""
    graph = made.graph
    chain_nodes = [node for section in made.sections for node in section.nodes if not node.glue]
    assert chain_nodes == list(graph.chain)
    for section in made.sections:
        there = {value for _, value in section.batch}
        there |= {value for values in section.receives.values() for value in values}
        for node in section.nodes:
            for value in node.inputs:
                fixed = not isinstance(graph.values[value].source, BatchLeaf) and value not in graph.maker
                assert value in there or fixed
            there |= set(node.makes)
        assert {value for values in section.sends.values() for value in values} <= there
        if section.needs_output:
            assert set(graph.output.refs) <= there
    for one, two in itertools.permutations(made.sections, 2):
        assert one.sends.get(two.stage, ()) == two.receives.get(one.stage, ())
        assert one.gradient_sends.get(two.stage, ()) == two.gradient_receives.get(one.stage, ())


def test_parameters_are_never_sent():
    for program in (straight, skipping):
        made = cut(GRAPHS[program], [1, 2])
        for section in made.sections:
            for values in section.sends.values():
                assert not any(isinstance(GRAPHS[program].values[v].source, ParameterSource) for v in values)


# -- where


def test_a_cut_never_parts_a_change_from_an_alias_that_matters():
    graph = graph_of(changing)
    legal = legal_positions(graph)
    view, change = at(graph, "__getitem__"), at(graph, "add_")
    assert not any(legal[view + 1 : change + 1])
    assert legal[1], "before there is an alias"


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
