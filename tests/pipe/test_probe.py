"""What handing tensors over takes of a rank, measured over a link of known speed, on a clock of its own."""

import time

import pytest
import torch

from evenflow.ir.costs import Link as LinkCost
from evenflow.pipe.building import probe
from evenflow.runtime.links.link import Link

HANDLING_SECONDS, PRODUCT_SECONDS = 2e-4, 1e-3
SECONDS_PER_BYTE = 1e-10  # of handling, where sizes count


class Symmetrical(Link):
    """The other rank does at every moment what this one does; `now` is what the clock shows."""

    def __init__(self, cost: LinkCost, seconds_per_byte: float = 0.0):
        self.cost, self.seconds_per_byte = cost, seconds_per_byte
        self.now, self.free, self.arrivals = 0.0, 0.0, {}

    def start(self, receives):
        self.arrivals.clear()

    def send(self, op, parcel, manifest):
        num_bytes = sum(tensor.nbytes for tensor in parcel)
        self.handling_seconds = HANDLING_SECONDS + self.seconds_per_byte * num_bytes
        self.now += self.handling_seconds
        self.free = max(self.free, self.now) + self.cost.occupied_seconds(num_bytes)
        self.arrivals[op.microbatch] = self.free + self.cost.latency_seconds

    def post(self, op):
        pass

    def exchange(self, sends, receives):
        raise AssertionError("a probe sends no groups")

    def take(self, op):
        self.now = max(self.now, self.arrivals[op.microbatch]) + self.handling_seconds
        return (torch.zeros(1),)

    def finish(self):
        pass


def on_its_own_clock(link, monkeypatch):
    def product(*_):
        link.now += PRODUCT_SECONDS

    monkeypatch.setattr(time, "perf_counter", lambda: link.now)
    monkeypatch.setattr(torch, "mm", product)


@pytest.mark.parametrize("cost", [LinkCost(1e-6, 1e10), LinkCost(2e-3, 1.25e8)], ids=["fast", "slow"])
def test_waiting_for_a_link_is_no_rank_s_work(cost, monkeypatch):
    num_bytes = 2**21
    link = Symmetrical(cost)
    on_its_own_clock(link, monkeypatch)
    least = probe._UNDER_WAY * cost.transfer_seconds(num_bytes)
    assert probe._beside_ops(link, 0, (0, 1), num_bytes, least) == pytest.approx(HANDLING_SECONDS)


def test_what_a_parcel_takes_is_told_from_what_its_bytes_take(monkeypatch):
    cost = LinkCost(1e-5, 1e10)
    link = Symmetrical(cost, SECONDS_PER_BYTE)
    on_its_own_clock(link, monkeypatch)
    monkeypatch.setattr(probe, "_trips", lambda *asked: (cost.transfer_seconds(asked[-1]), 0.0))
    found = probe._probed(link, 0, (0, 1), torch.device("cpu"))
    assert found.link.latency_seconds == pytest.approx(cost.latency_seconds)
    assert found.link.bytes_per_second == pytest.approx(cost.bytes_per_second)
    assert found.parcel_seconds == pytest.approx(HANDLING_SECONDS)
    assert found.seconds_per_byte == pytest.approx(SECONDS_PER_BYTE)
