"""Layers, and activations of layers, that no device holds: planned, and trained under the cap."""

from pathlib import Path

import pytest
import too_wide

import evenflow
from evenflow.cli.plan import Asked, plan_run
from evenflow.cli.train import Flags
from evenflow.cluster.sizes import parse_bytes
from evenflow.plan.plan import Plan
from forked import launched

CLUSTER = """
[[hosts]]
devices = [{{kind = "small", count = {count}}}]
link = "bus"
[devices.small]
teraflops = {{float32 = 0.05}}
memory = "{memory}"
reserved = "0B"
memory_gib_per_second = 10
efficiency = 0.5
[links.bus]
latency_us = 20
gib_per_second = 2
"""
CASES = {  # how many devices, of how much memory; how tensor ranks share it, if the model does not know
    "wide": (4, "56MiB", {"up": "colwise", "down": "rowwise"}),
    "wordy": (2, "40MiB", None),
}


def trained(name: str, options) -> tuple[list[float], int]:
    """Three steps' losses, and the peak of the second one's memory on this rank."""
    model, loss, batch = getattr(too_wide, name)()
    pipe = evenflow.pipeline(
        model, loss=loss, example=batch, optimizer=too_wide.adam, device="cpu", **options
    )
    losses = [float(pipe.step(batch).loss)]
    result, peak_bytes = pipe.meter.peak_bytes(lambda: pipe.step(batch))
    return [*losses, float(result.loss), float(pipe.step(batch).loss)], peak_bytes


def planned(name: str, folder: Path) -> Plan:
    count, memory, _ = CASES[name]
    cluster = folder / "cluster.toml"
    cluster.write_text(CLUSTER.format(count=count, memory=memory), encoding="utf-8")
    return plan_run(Flags(source=f"{too_wide.__file__}:{name}"), Asked(cluster=str(cluster)))


@pytest.mark.parametrize("name", CASES)
def test_what_no_device_holds_is_planned_with_tensor_ranks_and_trains_under_the_cap(name, tmp_path):
    count, memory, tensor_plan = CASES[name]
    plan = planned(name, tmp_path)
    assert plan.degrees.tensor > 1
    options = {"plan": plan, "tensor_plan": tensor_plan}
    ranks = launched(trained, name, options, nproc=count)
    alone, whole_bytes = trained(
        name, {"stages": 1, "microbatch_size": plan.microbatch_size, "num_microbatches": None}
    )
    cap_bytes = parse_bytes(memory)
    assert whole_bytes > cap_bytes
    for losses, peak_bytes in ranks:
        assert losses == pytest.approx(alone, rel=1e-5)
        assert peak_bytes <= cap_bytes
        assert peak_bytes == pytest.approx(plan.ranks[0].memory.allocated, rel=0.1)
