"""What waits for what, with skips and relays."""

from evenflow.ir import Backward, Flow, Forward, Handoff, Payload, Placement, Recv, Send
from evenflow.rules import carriers, dependencies

# Stage 0's value is used on stages 1 and 3: its gradient is relayed 3>1>0.
RELAY = Flow(
    activations=frozenset({(0, 1), (1, 2), (2, 3), (0, 3)}),
    gradients=frozenset({(3, 2), (2, 1), (3, 1), (1, 0)}),
)


def test_a_forward_waits_for_every_producer() -> None:
    assert dependencies(Forward(3, 5), RELAY) == (Forward(0, 5), Forward(2, 5))
    assert dependencies(Forward(0, 5), RELAY) == ()


def test_a_backward_waits_for_its_forward_and_every_gradient() -> None:
    assert dependencies(Backward(1, 5), RELAY) == (Forward(1, 5), Backward(2, 5), Backward(3, 5))
    assert dependencies(Backward(3, 5), RELAY) == (Forward(3, 5),)


def test_a_relayed_gradient_does_not_go_straight_to_the_producer() -> None:
    assert dependencies(Backward(0, 5), RELAY) == (Forward(0, 5), Backward(1, 5))


def test_carriers_depend_on_where_the_stages_live() -> None:
    looped = Placement((0, 1, 0))
    assert carriers(Forward(1, 4), Backward(1, 4), looped) == ()
    assert carriers(Backward(2, 4), Backward(0, 4), looped) == (Handoff(2, 0, 4, Payload.GRADIENT),)
    assert carriers(Forward(0, 4), Forward(1, 4), looped) == (
        Send(0, 1, 4, Payload.ACTIVATION),
        Recv(0, 1, 4, Payload.ACTIVATION),
    )
