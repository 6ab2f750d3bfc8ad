"""Flows: edges run the right way."""

import pytest

from evenflow.errors import ScheduleError
from evenflow.ir import Flow


def test_chain_of_one_stage_has_no_edges() -> None:
    assert Flow.chain(1) == Flow(frozenset(), frozenset())


def test_sources_are_ascending() -> None:
    flow = Flow(activations=frozenset({(2, 3), (0, 3), (1, 3)}), gradients=frozenset({(3, 0), (1, 0)}))
    assert flow.activations_into(3) == (0, 1, 2)
    assert flow.gradients_into(0) == (1, 3)
    assert flow.activations_into(0) == ()


def test_edges_the_wrong_way_are_all_listed() -> None:
    with pytest.raises(ScheduleError) as caught:
        Flow(activations=frozenset({(2, 1), (0, 0), (0, 1)}), gradients=frozenset({(0, 1)}))
    assert str(caught.value).split("; ") == [
        "activation edge 0>0 does not lead to a later stage",
        "activation edge 2>1 does not lead to a later stage",
        "gradient edge 0>1 does not lead to an earlier stage",
    ]
