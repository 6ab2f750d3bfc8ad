"""What waits for what, with skips and relays."""

from evenflow.ir import (
    Backward,
    Flow,
    Forward,
    Handoff,
    InputGrad,
    Overlap,
    Payload,
    Placement,
    Recv,
    ReduceGrads,
    Send,
    WeightGrad,
)
from evenflow.rules import carriers, dependencies, reduced, results

# Stage 0's value is used on stages 1 and 3: its gradient is relayed 3>1>0.
RELAY = Flow(
    activations=frozenset({(0, 1), (1, 2), (2, 3), (0, 3)}),
    gradients=frozenset({(3, 2), (2, 1), (3, 1), (1, 0)}),
)


def test_a_forward_waits_for_every_producer() -> None:
    assert dependencies(Forward(3, 5), RELAY) == (Forward(0, 5), Forward(2, 5))
    assert dependencies(Forward(0, 5), RELAY) == ()


def test_a_backward_waits_for_its_forward_and_every_gradient() -> None:
    assert dependencies(Backward(1, 5), RELAY) == (Forward(1, 5), InputGrad(2, 5), InputGrad(3, 5))
    assert dependencies(Backward(3, 5), RELAY) == (Forward(3, 5),)


def test_a_relayed_gradient_does_not_go_straight_to_the_producer() -> None:
    assert dependencies(Backward(0, 5), RELAY) == (Forward(0, 5), InputGrad(1, 5))


def test_carriers_depend_on_where_the_stages_live() -> None:
    looped = Placement((0, 1, 0))
    assert carriers(Forward(1, 4), 1, looped) == ()
    assert carriers(InputGrad(2, 4), 0, looped) == (Handoff(2, 0, 4, Payload.GRADIENT),)
    assert carriers(Forward(0, 4), 1, looped) == (
        Send(0, 1, 4, Payload.ACTIVATION),
        Recv(0, 1, 4, Payload.ACTIVATION),
    )


def test_a_split_backward_waits_as_a_whole_one_does() -> None:
    assert dependencies(InputGrad(1, 5), RELAY) == dependencies(Backward(1, 5), RELAY)
    assert dependencies(WeightGrad(1, 5), RELAY) == (InputGrad(1, 5),)
    assert results(Backward(1, 5)) == (InputGrad(1, 5), WeightGrad(1, 5))


def test_an_overlap_waits_for_and_makes_what_both_do() -> None:
    both = Overlap(Forward(3, 6), Backward(1, 5))
    assert results(both) == (Forward(3, 6), InputGrad(1, 5), WeightGrad(1, 5))
    assert dependencies(both, RELAY) == (
        Forward(0, 6),
        Forward(2, 6),
        Forward(1, 5),
        InputGrad(2, 5),
        InputGrad(3, 5),
    )


def test_a_reduction_waits_for_every_weight_gradient() -> None:
    assert reduced(ReduceGrads(3), 2) == (WeightGrad(3, 0), WeightGrad(3, 1))
