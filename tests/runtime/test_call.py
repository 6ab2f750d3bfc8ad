"""Calls made ready for a device."""

import torch
from torch import nn

from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.recording.record import record
from evenflow.runtime.program.call import Prepare
from evenflow.runtime.program.rng import Streams

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


class Counting(nn.Module):
    """Reads one buffer and changes another, each twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("again", self.count)

    def forward(self, x):
        self.count.add_(self.scale)
        self.count.mul_(self.scale)
        return self.layer(x)


def test_a_changed_buffer_is_moved_and_stays_one():
    model = Counting()
    tree = record(
        lambda model, x: model(x).sum(),
        model,
        torch.ones(2, 4),
        device=CPU,
        fakes=FakeParameters(model, CPU),
    )
    graph = flatten(tree, max_share=0.0)
    prepare = Prepare(
        graph,
        model,
        ELSEWHERE,
        Streams(0, CPU),
        parameter_of=lambda name, _: model.get_parameter(name),
        places_of=lambda _: [],
    )
    calls = [prepare.call(node) for node in graph.nodes if node.changed_buffers]
    taken = [leaf for call in calls for leaf in call.args.leaves if isinstance(leaf, torch.Tensor)]
    assert {leaf.device for leaf in taken} == {ELSEWHERE}
    assert [leaf is model.count for leaf in taken] == [True, False, True, False]
    assert model.again is model.count
    assert model.scale.device == CPU  # what is only read may be copied, to several stages
