"""What planning takes stages to hand to each other is what the cut program hands over."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from evenflow.cluster.device import Device
from evenflow.cost.estimate import estimate
from evenflow.graph.cutting.cut import cut
from evenflow.graph.cutting.positions import legal_positions, num_bytes
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.recording.record import record
from evenflow.plan.costs.traffic import traffic_of
from small_models import batches, t5

CPU = torch.device("cpu")
TOY = Device("toy", {"float32": 1e12}, 2.0**30, 1e11, 0.0, 0.5, "made up")


class Ladder(nn.Module):
    """Each rung also reads what the one three below made; the last reads them all."""

    def __init__(self):
        super().__init__()
        self.rungs = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x):
        made = [x]
        for rung in self.rungs:
            made.append(torch.tanh(rung(made[-1] + made[max(0, len(made) - 3)])))
        return sum(made).mean()


def graphs():
    ladder, row = Ladder(), torch.randn(2, 4)
    yield "ladder", ladder, row, lambda model, x: model(x)
    yield "t5", t5(0.0), batches()[0], lambda model, batch: model(**batch).loss


@pytest.mark.parametrize(("model", "batch", "loss"), [case[1:] for case in graphs()], ids=["ladder", "t5"])
def test_every_edge_has_the_bytes_of_its_sends(model, batch, loss):
    tree = record(loss, model, batch, device=CPU, fakes=FakeParameters(model, CPU))
    graph = flatten(tree, max_share=0.0)
    chain = estimate(graph, model, [TOY], num_rows=2)
    assert chain.skips
    legal = [at for at, may in enumerate(legal_positions(graph)[: chain.num_nodes]) if may and at]
    draw = random.Random(0)
    for _ in range(20):
        positions = tuple(sorted(draw.sample(legal, draw.randint(1, 5))))
        made = cut(graph, positions)
        sends, gradients = Counter(), Counter()
        for section in made.sections:
            for found, edges in ((sends, section.sends), (gradients, section.gradient_sends)):
                for target, values in edges.items():
                    size = sum(num_bytes(graph.values[value].info) for value in values)
                    found[section.stage, target] += size
        traffic = traffic_of(chain, positions)
        assert {edge: size for edge, size in traffic.activations.items() if size} == sends
        assert {edge: size for edge, size in traffic.gradients.items() if size} == gradients
