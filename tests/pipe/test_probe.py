"""What handing tensors over takes of a rank, measured over a link of known speed, on a clock of its own."""

import time

import pytest
import torch

from evenflow.ir.costs import Link as LinkCost
from evenflow.pipe.building import probe
from evenflow.runtime.links.link import Link

HANDLING_SECONDS, PRODUCT_SECONDS = 2e-4, 1e-3


class Symmetrical(Link):
    """The other rank does at every moment what this one does; `now` is what the clock shows."""

    def __init__(self, cost: LinkCost, num_bytes: int):
        self.cost, self.num_bytes = cost, num_bytes
        self.now, self.free, self.arrivals = 0.0, 0.0, {}

    def start(self, receives):
        self.arrivals.clear()

    def send(self, op, parcel, manifest):
        self.now += HANDLING_SECONDS
        self.free = max(self.free, self.now) + self.cost.occupied_seconds(self.num_bytes)
        self.arrivals[op.microbatch] = self.free + self.cost.latency_seconds

    def post(self, op):
        pass

    def exchange(self, sends, receives):
        raise AssertionError("a probe sends no groups")

    def take(self, op):
        self.now = max(self.now, self.arrivals[op.microbatch]) + HANDLING_SECONDS
        return (torch.zeros(1),)

    def finish(self):
        pass


@pytest.mark.parametrize("cost", [LinkCost(1e-6, 1e10), LinkCost(2e-3, 1.25e8)], ids=["fast", "slow"])
def test_waiting_for_a_link_is_no_rank_s_work(cost, monkeypatch):
    num_bytes = 2**21
    link = Symmetrical(cost, num_bytes)

    def product(*_):
        link.now += PRODUCT_SECONDS

    monkeypatch.setattr(time, "perf_counter", lambda: link.now)
    monkeypatch.setattr(torch, "mm", product)
    least = probe._UNDER_WAY * cost.transfer_seconds(num_bytes)
    assert probe._beside_ops(link, 0, (0, 1), num_bytes, least) == pytest.approx(HANDLING_SECONDS)
