"""What the runtime gives back of what schedules promise, beside torch.distributed.pipelining.

In one run both take turns on the same workloads (see `workloads`), and so does DeepSpeed's engine where it is
installed; wall seconds are of the slowest rank, between two barriers. Run: `python benchmarks/runtime.py [A]
[B] [C] [D]`; with none named, all are run, and docs/runtime.png is drawn.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import emulated
import torch
import torch.distributed as dist
import workloads
from deepspeed_engine import IS_INSTALLED, DeepSpeeds
from runtime_picture import Bar, Panel, draw
from torch.distributed.pipelining import PipelineStage, schedules
from workloads import Workload

import evenflow
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.timeline import Timeline
from evenflow.launcher import launch
from evenflow.pipe.given.places import world_of
from evenflow.runtime.notes.clocks import HostClock
from evenflow.schedules import catalog
from evenflow.simulate import simulate

ROUNDS, WARM_UPS = 9, 2
_CPU = torch.device("cpu")
_PICTURE = Path(__file__).parents[1] / "docs" / "runtime.png"
# torch's own: the class, and how many stages a rank has.
_TORCHS: dict[str, tuple[Any, int]] = {
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "zero-bubble": (schedules.ScheduleInterleavedZeroBubble, 1),
    "zb-v": (schedules.ScheduleZBVZeroBubble, 2),
}

Gradients = dict[str, torch.Tensor]
Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # a microbatch's inputs and targets


@dataclass
class Took:
    """Wall and CPU seconds of each round; what else is told of a competitor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    told: dict[str, float] = field(default_factory=dict)


class Ours:
    """Evenflow, by a schedule's name."""

    def __init__(self, workload: Workload, schedule: str | None, num_stages: int) -> None:
        loss, number = workload.loss, len(workload.inputs)
        self.batch = {"x": workload.inputs, "y": workload.targets}
        levers: dict[str, Any] = {
            "schedule": schedule,
            "stages": num_stages,
            "split": [str(cut) for cut in workload.cuts(num_stages)],
            "num_microbatches": number,
        }
        self.pipe = evenflow.pipeline(
            workload.chain,
            loss=lambda model, batch: loss(model(batch["x"]), batch["y"]),
            example=self.batch,
            **({"plan": "auto", "microbatch_size": 1} if schedule is None else levers),
        )

    def step(self) -> None:
        """Forward and backward of a batch."""
        self.pipe.step(self.batch, update=False)

    def gradients(self) -> Gradients:
        """Those of this rank's parameters, by the chain's names."""
        return {name: g.clone() for name, g in self.pipe.named_gradients() if g is not None}


class Torchs:
    """torch.distributed.pipelining, by a schedule's name."""

    def __init__(self, workload: Workload, schedule: str) -> None:
        kind, on_each = _TORCHS[schedule]
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        number = self.size * on_each
        own = [self.rank] if on_each == 1 else [self.rank, number - 1 - self.rank]
        modules = workload.stages(number)
        self.modules = {stage: modules[stage] for stage in own}
        stages = [PipelineStage(self.modules[stage], stage, number, _CPU) for stage in own]
        self.schedule = kind(
            stages[0] if schedule in {"gpipe", "1f1b"} else stages,
            len(workload.inputs),
            loss_fn=workload.loss,
        )
        self.given = (workload.inputs,) if 0 in own else ()
        self.wanted = {"target": workload.targets, "losses": []} if number - 1 in own else {}

    def step(self) -> None:
        """Forward and backward of a batch."""
        self.schedule.step(*self.given, **self.wanted, return_outputs=False)

    def gradients(self) -> Gradients:
        """As `Ours.gradients`."""
        found = {}
        for module in self.modules.values():
            for name, parameter in module.named_parameters():
                assert parameter.grad is not None, "every parameter is used"
                found[name] = parameter.grad.clone()
        return found


class Alone:
    """Each rank's own first stage in a loop, without a pipeline: what the devices take by themselves."""

    def __init__(self, workload: Workload) -> None:
        self.stage = workload.stages(dist.get_world_size())[0]
        self.inputs = workload.inputs

    def step(self) -> None:
        """Forward and backward of as many microbatches as a batch has."""
        for x in self.inputs.split(1):
            y = self.stage(x.requires_grad_())
            y.backward(torch.ones_like(y))

    def gradients(self) -> Gradients:
        """None that others have."""
        return {}


class Plain:
    """A loop over microbatches on the first rank, while the others wait."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        pairs = list(zip(workload.inputs.split(1), workload.targets.split(1), strict=True))
        self.own = self.share(pairs)

    def share(self, microbatches: Pairs) -> Pairs:
        """This rank's microbatches."""
        return microbatches if dist.get_rank() == 0 else []

    def step(self) -> None:
        """Forward and backward of this rank's microbatches."""
        work = self.workload
        for x, y in self.own:
            loss = work.loss(work.chain(x), y)
            loss.backward(torch.full_like(loss, 1 / len(work.inputs)))

    def gradients(self) -> Gradients:
        """As `Ours.gradients`."""
        return workloads.gradients_of(self.workload.chain)


class Halves(Plain):
    """Such a loop on each rank, over its share of the microbatches: what the machine itself allows."""

    def share(self, microbatches: Pairs) -> Pairs:
        """See `Plain`."""
        return microbatches[dist.get_rank() :: dist.get_world_size()]

    def gradients(self) -> Gradients:
        """None that can be compared: each rank has parts of all."""
        return {}


Competitor = Ours | Torchs | Plain | Alone | DeepSpeeds
Makers = Mapping[str, Callable[[], Competitor]]


def taken_in_turn(makers: Makers, *, rounds: int = ROUNDS) -> dict[str, Took]:
    """What each competitor took, on the slowest rank; and how far its gradients are from the first's."""
    torch.set_num_threads(1)
    world_of("cpu")
    competitors = {name: make() for name, make in makers.items()}
    emulated.DEVICE.is_on = True
    found = {name: Took() for name in competitors}
    reference: Gradients = {}
    for at in range(WARM_UPS + rounds):
        for name, competitor in competitors.items():
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            competitor.step()
            spent = (start, time.perf_counter(), time.process_time() - cpu)
            mine = torch.tensor(spent, dtype=torch.float64)
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(every, mine)
            starts, ends, cpus = torch.stack(every).unbind(1)
            if at >= WARM_UPS:
                found[name].wall.append(float((ends - starts).max()))
                found[name].cpu.append(float(cpus.sum()))
            # As bills count: who leaves the barrier early waits for the others before any op.
            found[name].told["from last start to last end"] = float(ends.max() - starts.max())
            if at == 0:  # later ones add up
                gathered: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(gathered, competitor.gradients())
                gradients = {key: value for each in gathered for key, value in each.items()}
                reference = reference or gradients
                if gradients:
                    found[name].told["gradients differ by"] = _difference(gradients, reference)
    for name, competitor in competitors.items():
        if isinstance(competitor, Ours):
            predicted, measured = competitor.pipe.timelines()
            found[name].told["timeline"] = measured.makespan_seconds
            found[name].told["predicted timeline"] = predicted.makespan_seconds
            found[name].told["ops end off by"] = _ends_off(predicted, measured)
            _, bills = competitor.pipe.bills()
            watched = found[name].told["from last start to last end"]
            found[name].told["bills off by"] = max(abs(bill.step / watched - 1) for bill in bills)
            num_ops = max(len(lane.ops) for lane in measured.lanes)
            found[name].told["noting"] = num_ops * _noting_seconds() / watched
    return found


def _noting_seconds() -> float:
    """What it takes to note one op's times, as the executor does."""
    mark, marks, number = HostClock().mark, [], 10_000
    start = time.perf_counter()
    for _ in range(number):
        began, started = mark(), mark()
        marks.append((began, started, mark()))
    return (time.perf_counter() - start) / number


def _ends_off(predicted: Timeline, measured: Timeline) -> float:
    """How far from the predicted time an op ends, in the median; a share of the whole."""
    ends = {(span.rank, span.op): span.end_seconds for span in measured.spans if span.is_compute}
    gaps = [abs(ends[s.rank, s.op] - s.end_seconds) for s in predicted.spans if s.is_compute]
    return statistics.median(gaps) / predicted.makespan_seconds


def _difference(found: Gradients, expected: Gradients) -> float:
    # Of emulated devices, pipelines with more stages have more parameters.
    pairs = [(found[name], expected[name]) for name in expected if name in found]
    gaps = ((one - other).abs().max() / other.abs().max().clamp(min=1e-30) for one, other in pairs)
    return max(map(float, gaps), default=0.0)


def _a() -> dict[str, Took]:
    """A GPT on two ranks of one thread."""
    torch.set_num_threads(1)
    world_of("cpu")
    workload = workloads.gpt(16)
    cuts: list[Any] = [workload.cuts(2)]
    dist.broadcast_object_list(cuts, 0)
    workload = Workload(
        workload.chain, workload.inputs, workload.targets, workload.loss, lambda n: cuts[0] if n == 2 else ()
    )
    makers: Makers = {
        "one thread": lambda: Plain(workloads.gpt(16)),
        "two threads, half the microbatches each": lambda: Halves(workloads.gpt(16)),
        "torch, 1f1b": lambda: Torchs(_again(workload), "1f1b"),
        "torch, zero-bubble": lambda: Torchs(_again(workload), "zero-bubble"),
        **_deepspeed(lambda: _again(workload)),
        "ours, 1f1b": lambda: Ours(_again(workload), "1f1b", 2),
        "ours, zb-h1": lambda: Ours(_again(workload), "zb-h1", 2),
        "ours, as planned": lambda: Ours(_again(workload), None, 2),
    }
    return taken_in_turn(makers)


def _deepspeed(workload: Callable[[], Workload]) -> dict[str, Callable[[], Competitor]]:
    return {"deepspeed, 1f1b": lambda: DeepSpeeds(workload())} if IS_INSTALLED else {}


def _again(workload: Workload) -> Workload:
    """The same numbers in other parameters."""
    other = workloads.gpt(16)
    return Workload(other.chain, workload.inputs, workload.targets, workload.loss, workload.cuts)


def _asleep(num_ranks: int, num_microbatches: int, width: int, theirs: tuple[str, ...]) -> dict[str, Took]:
    def workload(on_each: int) -> Workload:
        stages = num_ranks * on_each
        return workloads.asleep(stages, num_microbatches, width=width, seconds=5e-3 / on_each)

    makers: dict[str, Callable[[], Competitor]] = {}
    for name in theirs:
        makers[f"torch, {name}"] = partial(Torchs, workload(_TORCHS[name][1]), name)
    makers |= _deepspeed(lambda: workload(1))
    for name in ("zb-h1", "zb-auto", "zb-v"):
        on_each = 2 if name == "zb-v" else 1
        makers[f"ours, {name}"] = partial(Ours, workload(on_each), name, num_ranks * on_each)
    makers["devices alone"] = partial(Alone, workload(1))
    found = taken_in_turn(makers)
    for name, took in found.items():
        if name == "devices alone":
            took.told["ideal"] = 3 * 5e-3 * num_microbatches
            continue
        system, schedule = name.split(", ")
        schedule = {"zero-bubble": "zb-h1"}.get(schedule, schedule)
        if system == "ours" or schedule != "1f1b":
            took.told["ideal"] = ideal(schedule, num_ranks, num_microbatches)
    return found


def ideal(schedule: str, num_ranks: int, num_microbatches: int) -> float:
    """Seconds of an emulated schedule in which nothing but the sleeps takes time."""
    on_each = 2 if schedule == "zb-v" else 1
    seconds = 5e-3 / on_each
    made = catalog.get(schedule)(num_ranks, on_each, num_microbatches)
    stages = num_ranks * on_each
    return simulate(
        made, Flow.chain(stages), Costs.uniform(stages, seconds, seconds, seconds)
    ).makespan_seconds


def _d() -> dict[str, Took]:
    """Stages that cost nothing."""
    workload = partial(workloads.tiny, 2, 64)
    return taken_in_turn(
        {
            "one process": lambda: Plain(workload()),
            "torch, 1f1b": lambda: Torchs(workload(), "1f1b"),
            "torch, gpipe": lambda: Torchs(workload(), "gpipe"),
            **_deepspeed(workload),
            "ours, 1f1b": lambda: Ours(workload(), "1f1b", 2),
            "ours, gpipe": lambda: Ours(workload(), "gpipe", 2),
        },
        rounds=3 * ROUNDS,
    )


def shown(
    title: str, found: Mapping[str, Took], *, per: int = 1, unit: str = "ms", scale: float = 1e3
) -> Panel:
    """Print a table; return what a picture shows of it."""
    first = statistics.median(next(iter(found.values())).wall)
    first_cpu = statistics.median(next(iter(found.values())).cpu)
    print(f"\n{title}; load {os.getloadavg()[0]:.1f}\n")
    print(
        f"| | {unit} (range) | first / it | CPU / first's | / ideal | timeline / predicted | ops end off by "
        "| bills off by | noting | gradients |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    bars = []
    for name, took in found.items():
        wall = statistics.median(took.wall)
        low, high = (each(took.wall) * scale / per for each in (min, max))
        own = took.told.get("ideal")
        bars.append(Bar(name, wall * scale / per, low, high, None if own is None else own * scale / per))
        apart = took.told.get("gradients differ by")
        timeline = took.told.get("timeline", 0) / took.told.get("predicted timeline", 1)
        print(
            f"| {name} | {wall * scale / per:,.0f} ({low:,.0f} to {high:,.0f}) | {first / wall:.2f} "
            f"| {statistics.median(took.cpu) / first_cpu:.3f} | {f'{wall / own:.3f}' if own else ''} "
            f"| {f'{timeline:.3f}' if timeline else ''} | {_share(took, 'ops end off by')} "
            f"| {_share(took, 'bills off by')} | {_share(took, 'noting')} "
            f"| {'' if apart is None else f'{apart:.0e}'} |",
            flush=True,
        )
    return Panel(title, unit, bars)


def _share(took: Took, what: str) -> str:
    return f"{took.told[what]:.2%}" if what in took.told else ""


def main() -> None:
    """Print the tables of the workloads that are named; or of all, and draw them."""
    named, panels = sys.argv[1:] or ["A", "B", "C", "D"], []
    if "A" in named:
        panels.append(shown("A: a GPT, 2 ranks, 16 microbatches", launch(_a, nproc=2)[0]))
    if "B" in named:
        for ranks, theirs in ((8, ("1f1b", "zero-bubble", "zb-v")), (4, ("1f1b", "zero-bubble"))):
            found = launch(_asleep, ranks, 32, 4, theirs, nproc=ranks)[0]
            panels.append(shown(f"B: emulated devices, {ranks} ranks, 32 microbatches", found))
    if "C" in named:
        found = launch(_asleep, 4, 16, 2**20, ("1f1b", "zero-bubble"), nproc=4)[0]
        panels.append(shown("C: emulated devices, 4 ranks, 16 microbatches of 4 MiB", found))
    if "D" in named:
        found = launch(_d, nproc=2)[0]
        title = "D: stages that cost nothing, a forward and a backward"
        panels.append(shown(title, found, per=64, unit="us", scale=1e6))
    if not sys.argv[1:]:
        draw(panels, _PICTURE)


if __name__ == "__main__":
    main()
