"""The boundary of a stage: gradients arrive as autograd hands them over, and enter first in the sum."""

import pytest
import torch

from evenflow.cost.storages import Memory
from evenflow.runtime.program.backward import receive, root_of


def anchor() -> torch.Tensor:
    return torch.empty(0, requires_grad=True)


USES = {
    "transposed": lambda x: (x.t().contiguous() ** 2).sum(),
    "expanded": lambda x: x.sum(),
    "row of a sum": lambda x: x.sum(0)[1],
    "permuted product": lambda x: (x.t() @ torch.ones(3, 2)).sum(),
    "sliced": lambda x: x[:, ::2].exp().sum(),
    "plain": lambda x: (x * 3).sum(),
}


@pytest.mark.parametrize("use", USES)
def test_the_gradient_keeps_the_strides_that_autograd_gives_it(use):
    seen = []
    inner = torch.randn(3, 4).requires_grad_() * 1.0
    inner.register_hook(seen.append)
    USES[use](inner).backward()
    sink = {}
    USES[use](receive(inner.detach(), 7, sink, anchor())).backward()
    assert sink.keys() == {7}
    assert torch.equal(sink[7], seen[0])
    assert sink[7].stride() == seen[0].stride()


def test_a_gradient_that_arrives_is_the_first_term_of_the_sum():
    """As in the unsplit program, where later uses run backward first."""
    sink = {}
    entered = receive(torch.zeros(()), 0, sink, anchor())
    here = entered * 1.0 + entered * -1e8
    torch.autograd.backward([entered, here], [torch.tensor(1e8), torch.ones(())])
    assert sink[0] == 1.0, "(1e8 - 1e8) + 1; in any other order the 1 is lost"


def test_nothing_arrives_where_nothing_flows():
    sink = {}
    entered = receive(torch.ones(2), 0, sink, anchor())
    (entered.detach() * torch.ones(2, requires_grad=True)).sum().backward()
    assert sink == {}


def test_the_graph_ends_at_the_boundary():
    outer = torch.ones(2, requires_grad=True)
    (receive(outer * 2, 0, {}, anchor()) * 3).sum().backward()
    assert outer.grad is None


def test_what_arrived_is_held_only_as_long_as_its_numbers_are_needed():
    arrived = torch.ones(4)
    memory, sink = Memory(arrived), {}
    leaf = anchor()
    entered = receive(arrived, 0, sink, leaf)
    used = entered * 2.0
    root = root_of(used)
    outcome = Memory(used)
    del arrived, entered, used
    assert not memory.alive, "the product of a number needs no input"
    assert not outcome.alive, "where the walk begins needs no numbers"
    torch.autograd.backward([root], [torch.ones(4)], inputs=[leaf])
    assert torch.equal(sink[0], torch.full((4,), 2.0))


def test_what_is_saved_stays():
    arrived = torch.ones(4)
    memory = Memory(arrived)
    entered = receive(arrived, 0, {}, anchor())
    used = entered.exp() * entered
    del arrived, entered
    assert memory.alive
    del used
    assert not memory.alive


def test_a_view_taken_without_gradients_has_no_root():
    made = torch.ones(4, requires_grad=True) * 2
    with torch.no_grad():
        view = made[:1]
    assert view.requires_grad, "as torch has it"
    assert root_of(view) is None
    assert root_of(made[:1]) is not None
    assert root_of(torch.nn.Parameter(torch.ones(4, 4)[:2])) is not None
