"""Cutting: what travels between stages, and what is computed again."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evenflow.graph.cutting.cut import Cut, cut
from evenflow.graph.cutting.positions import legal_positions
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.tree import BatchLeaf, ParameterSource
from evenflow.graph.recording.record import record
from unsplit import regression

WIDTH = 4


def graph_of(program, model: nn.Module | None = None, *, max_share: float = 0.0) -> Graph:
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "abcd"}) if model is None else model
    cpu = torch.device("cpu")
    tree = record(program, model, regression(4, WIDTH), device=cpu, fakes=FakeParameters(model, cpu))
    return flatten(tree, max_share=max_share)


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
