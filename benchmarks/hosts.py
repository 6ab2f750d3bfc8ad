"""What it is worth to know the link: two hosts of two ranks each, 1 Gbit/s and 2 ms apart.

The hosts are namespaces of this machine (see `namespaces`), the devices sleep (see `emulated`). The ranks
measure links, and what handing tensors over takes, as any run that plans itself does; only how long devices
sleep is known. The naive way is 1F1B that takes links for free and begins each receive when its value is
needed. The simulator says what it and others would take, and they take turns at running.
Run: `python benchmarks/hosts.py [ROUNDS]`, as root.
"""

import contextlib
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import emulated
import namespaces
import torch
import workloads
from quiet import Quiet

import evenflow
from evenflow.cluster.cluster import Cluster, Host
from evenflow.ir.costs import Costs, Link
from evenflow.ir.flow import Flow
from evenflow.ir.op import Recv, Send, SimpleOp
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.pipe.given.places import world_of
from evenflow.pipe.pipeline import Pipeline
from evenflow.plan.chain import Chain, Seconds
from evenflow.plan.choice import describe
from evenflow.plan.known_costs import known_costs
from evenflow.plan.own_order import own_schedule
from evenflow.plan.plan import Plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers, Request
from evenflow.rules import Result, dependencies, results
from evenflow.runtime.links import choose, process_group
from evenflow.runtime.links.link import Link as RunningLink
from evenflow.runtime.links.link import Manifest, Parcel
from evenflow.runtime.links.process_group import ProcessGroupLink
from evenflow.runtime.ranks.world import World
from evenflow.schedules import catalog
from evenflow.simulate import simulate

HOSTS, RANKS = ("first", "second"), 4
BYTES_PER_SECOND, DELAY_SECONDS = 1e9 / 8, 2e-3
UNITS, UNIT_SECONDS = 8, 2.5e-3  # of forward, input and weight gradient alike
MICROBATCHES, PARCEL_BYTES = 16, 2**19
ROUNDS, WARM_UPS = 15, 2


class WhenNeeded(RunningLink):
    """Begins each receive when its value is needed, as a loop that calls recv does; sends wait for nobody."""

    def __init__(self, device: torch.device, placement: Placement, *, members: Sequence[int]) -> None:
        with (
            mock.patch.object(process_group, "RECEIVES_AHEAD", 0),
            mock.patch.object(process_group, "SENDS_AHEAD", 2**20),
        ):
            self._inner = ProcessGroupLink(device, placement, members=members)

    def start(self, receives: Sequence[tuple[Recv, Manifest]]) -> None:
        self._inner.start(receives)

    def send(self, op: Send, parcel: Parcel, manifest: Manifest) -> None:
        self._inner.send(op, parcel, manifest)

    def post(self, op: Recv) -> None:
        """Nothing yet."""

    def exchange(self, sends: Sequence[tuple[Send, Parcel, Manifest]], receives: Sequence[Recv]) -> None:
        self._inner.exchange(sends, receives)

    def take(self, op: Recv) -> Parcel:
        self._inner.post(op)
        return self._inner.take(op)

    def finish(self) -> None:
        self._inner.finish()


@dataclass
class Way:
    """A way to run: its plan, what the simulator says of it, and what it took."""

    name: str
    plan: Plan
    predicted_seconds: float  # the pipeline alone
    pipe: Pipeline
    steps: list[float] = field(default_factory=list)
    pipelines: list[float] = field(default_factory=list)  # from the first op to the end of the last


def when_needed_seconds(schedule: Schedule, flow: Flow, costs: Costs) -> float:
    """What `simulate` says, where a transfer begins when its value is there and its receiver asks for it.

    The sender learns one latency later that it is asked, or later: the word waits behind a parcel that goes
    the same way.
    """
    rank_of = schedule.placement.rank_of
    ends: dict[Result, float] = {}
    free = [0.0] * len(schedule.ranks)
    busy: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)  # lines: from, until
    queues = [deque(queue) for queue in schedule.ranks]
    while any(queues):
        able = (r for r, q in enumerate(queues) if q and all(n in ends for n in dependencies(q[0], flow)))
        rank = min(able, key=free.__getitem__)  # so that words and parcels come in the order of time
        op = queues[rank].popleft()
        assert isinstance(op, SimpleOp), "1F1B overlaps nothing"
        start = free[rank]
        for each in dependencies(op, flow):
            line = rank_of[each.stage], rank
            if line[0] == rank:
                continue
            link, size = costs.link_between(*line), costs.sent_bytes[each.stage, op.stage]
            asks = max([free[rank], *(end for begin, end in busy[line[::-1]] if begin <= free[rank])])
            last = busy[line][-1][1] if busy[line] else 0.0
            begins = max(ends[each], asks + link.latency_seconds, last)
            busy[line].append((begins, begins + link.occupied_seconds(size)))
            start = max(start, begins + link.transfer_seconds(size))
        free[rank] = start + costs.seconds(op)
        ends.update(dict.fromkeys(results(op), free[rank]))
    return max(free)


def workload() -> workloads.Workload:
    """Emulated devices that hand each other parcels of the size."""
    return workloads.asleep(UNITS, MICROBATCHES, width=PARCEL_BYTES // 4, seconds=UNIT_SECONDS)


def as_emulated(request: Request) -> Request:
    """What was measured, but for the devices: how long these sleep is known."""

    def chain_of(rows: int) -> Chain:
        chain = request.chain_of(rows)
        each = tuple(UNIT_SECONDS if name.isdecimal() else 0.0 for name in chain.names)
        assert sum(each) == UNITS * UNIT_SECONDS, chain.names
        return replace(chain, seconds=dict.fromkeys(chain.seconds, Seconds(each, each, each)))

    return replace(request, chain_of=chain_of)


def plans_of(request: Request) -> dict[str, Plan]:
    """Plans that know the link, and one that takes all links for free."""
    cluster = request.cluster
    free = Cluster(tuple(Host(host.devices, Link()) for host in cluster.hosts), Link())
    levers = request.levers

    def planned(schedule: str | None, over: Cluster) -> Plan:
        return plan(replace(request, cluster=over, levers=replace(levers, schedule=schedule)))

    return {
        "blind": planned("1f1b", free),
        "1f1b": planned("1f1b", cluster),
        "eager-1f1b": planned("eager-1f1b", cluster),
        "best": planned(None, cluster),
    }


def schedule_of(made: Plan) -> Schedule:
    """The order that a plan names or has."""
    own = own_schedule(made)
    if own is not None:
        return own
    return catalog.get(made.schedule)(RANKS, made.stages_per_rank, made.num_microbatches)


def ways_of(request: Request, work: workloads.Workload, world: World) -> list[Way]:
    """What is compared, ready to run."""
    plans = plans_of(request) if world.rank == 0 else {}
    plans = world.share(plans, 0)
    links = plans["best"].links
    loss = work.loss
    batch = {"x": work.inputs, "y": work.targets}

    def way(name: str, made: Plan, *, asks: bool = False) -> Way:
        schedule = schedule_of(made)
        costs = known_costs(replace(made, links=links))
        assert costs is not None, "it was measured"
        flow = Flow.chain(schedule.placement.num_stages)
        late = mock.patch.object(choose, "ProcessGroupLink", WhenNeeded)
        with late if asks else contextlib.nullcontext():
            pipe = evenflow.pipeline(
                workload().chain,
                loss=lambda model, batch: loss(model(batch["x"]), batch["y"]),
                example=batch,
                plan=made,
                atomic=(emulated.Stage,),
            )
        seconds = (
            when_needed_seconds(schedule, flow, costs)
            if asks
            else simulate(schedule, flow, costs).makespan_seconds
        )
        return Way(name, made, seconds, pipe)

    return [
        way("naive: 1f1b, no link known, receives when needed", plans["blind"], asks=True),
        way("1f1b, no link known, receives posted ahead", plans["blind"]),
        way("1f1b, the link known", plans["1f1b"]),
        way("eager-1f1b, the link known", plans["eager-1f1b"]),
        way("as planned", plans["best"]),
    ]


def taken_in_turn(ways: Sequence[Way], work: workloads.Workload, world: World, rounds: int) -> None:
    """Run each way, round after round."""
    batch = {"x": work.inputs, "y": work.targets}
    for number in range(WARM_UPS + rounds):
        for way in ways:
            world.gather_numbers([0])
            start = time.perf_counter()
            float(way.pipe.step(batch, update=False).loss)
            spans: list[tuple[float, float]] = world.gather((start, time.perf_counter()))
            starts, ends = zip(*spans, strict=True)  # the hosts are one machine, with one clock
            _, measured = way.pipe.timelines()
            if number >= WARM_UPS:
                way.steps.append(max(ends) - max(starts))
                way.pipelines.append(measured.makespan_seconds)


def on_rank(rounds: int) -> None:
    """What each rank does; the first tells."""
    torch.set_num_threads(1)
    world = world_of("cpu")
    emulated.DEVICE.is_on = True
    work = workload()
    loss = work.loss
    run = Run(
        work.chain,
        lambda model, batch: loss(model(batch["x"]), batch["y"]),
        {"x": work.inputs, "y": work.targets},
        None,
        atomic=(emulated.Stage,),
        levers=Levers(pipeline=RANKS, microbatch_size=1).pipeline_only(),
    )
    cpu = torch.device("cpu")
    quiet = Quiet(world)  # what is measured only once must not be measured while others compute
    measured = quiet.during(lambda often: measured_request(run, world, cpu, progress=often))
    request = as_emulated(measured)
    ways = ways_of(request, work, world)
    taken_in_turn(ways, work, world, rounds)
    if world.rank == 0:
        tell(request, ways)


def tell(request: Request, ways: Sequence[Way]) -> None:
    """Print what was found."""
    for pair in ((0, 1), (1, 2)):
        link = request.cluster.link_between(*pair)
        rate = link.bytes_per_second * 8e-9
        print(f"ranks {pair[0]} and {pair[1]}: {link.latency_seconds * 1e3:.2f} ms, {rate:.2f} Gbit/s")
    for way in ways:
        nodes = "+".join(str(stage.num_nodes) for stage in way.plan.stages)
        print(f"{way.name}: {describe(way.plan.choice)}, {nodes} nodes")
    naive = ways[0]
    print(f"\n{len(naive.steps)} rounds; load {os.getloadavg()[0]:.1f}; the pipeline, in ms\n")
    print(
        "| | pipeline: simulated | measured (range) | off | step | naive / it: simulated | measured | off |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for way in ways:
        took, step = statistics.median(way.pipelines), statistics.median(way.steps)
        low, high = min(way.pipelines) * 1e3, max(way.pipelines) * 1e3
        promised = naive.predicted_seconds / way.predicted_seconds
        kept = statistics.median(naive.pipelines) / took
        print(
            f"| {way.name} | {way.predicted_seconds * 1e3:.0f} | {took * 1e3:.0f} ({low:.0f} to {high:.0f}) "
            f"| {way.predicted_seconds / took - 1:+.1%} | {step * 1e3:.0f} "
            f"| {promised:.2f} | {kept:.2f} | {promised / kept - 1:+.1%} |"
        )
    print(f"\nfor a step besides: {request.overheads.step_seconds * 1e3:.1f} promised")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    if "RANK" in os.environ:
        on_rank(rounds)
        return
    if (reason := namespaces.why_not()) is not None:
        print(f"skipped: {reason}")
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with namespaces.hosts(HOSTS, bytes_per_second=BYTES_PER_SECOND, delay_seconds=DELAY_SECONDS) as hosts:
        run = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
        run += [f"--nproc-per-node={RANKS // len(hosts)}", f"--master-addr={HOSTS[0]}", "--master-port=29500"]
        script = [str(Path(__file__)), str(rounds)]
        running = [
            host.start([*run, f"--node-rank={number}", *script], environment)
            for number, host in enumerate(hosts)
        ]
        ended = [process.wait(timeout=600) for process in running]
    sys.exit(max(ended))


if __name__ == "__main__":
    main()
