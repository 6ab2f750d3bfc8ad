"""From costs of single nodes, given by hand, to a chain."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from evenflow.cost.assemble import chain_of
from evenflow.cost.measured import Kept, Measured
from evenflow.pipe.building.recorded import recorded
from evenflow.pipe.given.splitter import Splitter


def chain(model, loss, *, backward=2.0, input_grad=1.5):
    """Each node takes 1 s forward and keeps 100 bytes of its own, its first input and its first result."""
    batch = {"x": torch.randn(4, 8), "at": torch.tensor([0, 1, 2, 3])}
    found = recorded(
        model,
        loss=loss,
        example=batch,
        splitter=Splitter(1, 1, None, None),
        max_leaf_share=0.0,
        device=torch.device("cpu"),
    )
    graph = found.graph
    costs = {
        node.index: Measured(
            forward_seconds=1.0,
            backward_seconds=0.0 if node.glue else backward,
            input_grad_seconds=0.0 if node.glue else input_grad,
            entry_seconds=0.25,
            saved=Kept(inputs=(0,), results=(0,), private_bytes=100),
            kept=Kept(inputs=(0,), results=(), private_bytes=50),
            result_bytes=(1000,) * len(node.makes),
            forward_peak_bytes=1500,
            backward_peak_bytes=700,
        )
        for node in graph.nodes
    }
    return chain_of(graph, model, costs, num_rows=4, kind="cpu")


def test_the_parts_of_a_backward_add_up_to_the_whole():
    made = chain(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), lambda m, b: m(b["x"]).sum())
    assert made.seconds["cpu"].forward == (1.0, 1.0, 1.0)
    assert made.seconds["cpu"].input_grad == (1.5, 1.5, 1.5)
    assert made.seconds["cpu"].weight_grad == (0.5, 0.5, 0.5)


def test_in_a_checkpoint_the_forward_is_part_of_the_input_gradient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=False)

    made = chain(Model(), lambda m, b: m(b["x"]).sum())
    assert made.names[:2] == ("first", "second")
    assert made.seconds["cpu"].input_grad[:2] == (1.5, 1.0 + 2.0)
    assert made.seconds["cpu"].weight_grad[:2] == (0.5, 0.0)
    assert [one.num_bytes for one in made.saved if one.nodes == (1,)] == []  # nothing of its own


def test_a_memory_that_several_nodes_keep_is_one_and_names_them_all():
    made = chain(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), lambda m, b: m(b["x"]).sum())
    assert [(one.num_bytes, one.nodes) for one in made.saved] == [
        (4 * 8 * 4, (0,)),  # the batch
        (100, (0,)),
        (1000, (0, 1)),
        (100, (1,)),
        (1000, (1, 2)),
        (1000, (2,)),
        (100, (2,)),
    ]
    assert sum(one.num_bytes for one in made.kept) == 4 * 8 * 4 + 3 * 50 + 2 * 1000


def test_what_the_batch_decides_is_computed_where_it_is_needed_first():
    def loss(model, batch):
        mask = batch["at"].float() + 1.0
        return (model(batch["x"]) * mask[:, None]).sum()

    made = chain(nn.Linear(8, 8), loss)
    assert made.names[1] == "mul"
    assert made.seconds["cpu"].forward == (1.0, 1.0 + 3.0, 1.0)


def test_gradients_of_what_crosses_a_node_wait_beside_it():
    def loss(model, batch):
        first = model[0](batch["x"])
        return (model[1](first) + first).sum()

    made = chain(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), loss)
    size = 4 * 8 * 4
    # first; second, whose own and the first's; the sum's and both; the loss is followed by nobody
    assert made.backward_transient_bytes == (700 + size, 700 + 2 * size, 700 + size, 700 + 4)
