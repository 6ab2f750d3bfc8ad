"""What a plan or a schedule from a stranger may do: be refused, or train with the unsplit model's numbers."""

import dataclasses
import functools
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evenflow
from evenflow.cluster.short import parse_cluster
from evenflow.cost.estimate import estimate
from evenflow.errors import EvenflowError
from evenflow.foreign import visible
from evenflow.pipe.building.recorded import recorded
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.own_order import OwnOrder
from evenflow.plan.plan import Plan
from evenflow.plan.plan_file import read_plan_file, write_plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers, Request
from evenflow.plan.scale import scaled
from evenflow.schedule_file import format_schedule, parse_schedule
from evenflow.schedules import catalog
from own_schedules import OWN
from unsplit import Step, assert_same_step, mean_square, mlp, pipeline_step, plain_step, regression, sgd

SECONDS = 20  # of one file; most take milliseconds
MOST_BYTES = 3 * 2**30  # beside what the process has
NUM_MICROBATCHES = 4

PLANS = {
    "1f1b": Levers(pipeline=2, stages_per_rank=1, microbatch_size=2, schedule="1f1b"),
    "zb-h1": Levers(pipeline=2, stages_per_rank=1, microbatch_size=4, schedule="zb-h1"),
    "zb-v": Levers(pipeline=2, stages_per_rank=2, microbatch_size=2, schedule="zb-v"),
    "recompute": Levers(pipeline=2, stages_per_rank=1, microbatch_size=1, schedule="gpipe", recompute="full"),
}


def net() -> torch.nn.Module:
    return mlp(4, 8, 8, 1).double()


def batch() -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in regression().items()}


@functools.cache
def expected() -> Step:
    """Of the unsplit model and batch."""
    return plain_step(net(), mean_square, [batch()])


@functools.cache
def plan_texts() -> tuple[str, ...]:
    """Files of plans of many kinds, as Evenflow writes them."""
    machine = parse_cluster("2xRTX 4090")

    def of(rows: int) -> Any:
        found = recorded(
            mlp(4, 8, 8, 1),
            loss=mean_square,
            example=regression(rows),
            splitter=Splitter(1, 1, None, None),
            max_leaf_share=0.0,
            device=torch.device("cpu"),
        )
        return estimate(found.graph, found.model, machine.devices, num_rows=rows)

    small, large = of(2), of(4)

    def made(levers: Levers) -> Plan:
        sizes = {"batch_rows": 8, "row_tokens": 1.0, "max_leaf_share": 0.0, "dtype": "float32"}
        chain_of = functools.cache(lambda rows: scaled(small, large, rows))
        return plan(Request(chain_of, (1, 2, 4), machine, **sizes, levers=levers))

    plans = [made(levers) for levers in PLANS.values()]
    order = ("0F0,0F1,0F2,0B0,0F3,0B1,0I2,0B3,0W2", "1F0,1B0,1F1,1I1,1F2,1B2,1W1,1F3,1B3")
    first = plans[0]
    plans += [
        dataclasses.replace(first, schedule="auto", order=order),
        dataclasses.replace(first, degrees=dataclasses.replace(first.degrees, data=2, sharding="zero1")),
        dataclasses.replace(first, degrees=dataclasses.replace(first.degrees, tensor=2)),
    ]
    return tuple(map(write_plan, plans))


@functools.cache
def schedule_texts() -> tuple[str, ...]:
    """Files of schedules of many kinds, for two ranks and four microbatches."""
    per_rank = {
        name: catalog.default_stages_per_rank(name) for name in ("1f1b", "gpipe", "zb-h1", "zb-v", "v-half")
    }
    made = [catalog.get(name)(2, stages, NUM_MICROBATCHES) for name, stages in per_rank.items()]
    made += [
        own(2, own.stages_per_rank, NUM_MICROBATCHES) for own in OWN.values() if 2 * own.stages_per_rank <= 4
    ]
    return tuple(map(format_schedule, made))


def each_of(num_files: int, check: Callable[[st.DataObject], None]) -> None:
    """Check so many examples, the same ones every time."""
    run = settings(
        max_examples=num_files,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run(given(st.data())(check))()


class TooLateError(BaseException):
    """No `Exception`, which the code that is late could catch."""


@contextmanager
def bounded() -> Iterator[None]:
    """What runs meanwhile fails when it takes too long, or too much memory."""

    def late(*_: Any) -> None:
        raise TooLateError(f"it took more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, before[1]))
    started = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # it is also pytest-timeout's
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - started)) if left else 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_is_told_well(error: EvenflowError, path: Path | None = None) -> None:
    """A refusal names the file, is short enough to read, and holds nothing that a terminal obeys."""
    text = str(error)
    assert path is None or str(path) in text
    assert visible(text) == text
    assert 0 < len(text) < 20_000


def assert_harmless_plan(path: Path, ends: Counter[str]) -> None:
    """Read a plan's file; refused, or it runs with the right numbers. `ends` counts which."""
    with bounded():
        try:
            made = read_plan_file(path)
        except EvenflowError as error:
            assert_is_told_well(error, path)
            ends["not read"] += 1
            return
        _assert_runs({"plan": made}, ends)


def assert_harmless_schedule(path: Path, ends: Counter[str]) -> None:
    """Likewise for a schedule's file."""
    with bounded():
        try:
            made = parse_schedule(path.read_text(encoding="utf-8", errors="replace"), name="file")
        except EvenflowError as error:
            assert_is_told_well(error)
            ends["not read"] += 1
            return
        placement = made.placement
        _assert_runs(
            {
                "schedule": OwnOrder(made),
                "stages": placement.num_stages,
                "stages_per_rank": max(1, placement.num_stages // placement.num_ranks),
                "num_microbatches": min(made.num_microbatches, 8),
                "max_leaf_share": 0.0,
            },
            ends,
        )


def _assert_runs(options: dict[str, Any], ends: Counter[str]) -> None:
    model, rows = net(), batch()
    try:
        pipe = evenflow.pipeline(
            model, loss=mean_square, example=rows, device="cpu", optimizer=sgd, **options
        )
    except EvenflowError as error:
        assert_is_told_well(error)
        ends["not run"] += 1
        return
    try:
        found = pipeline_step(pipe, model, rows)
    finally:
        pipe.close()
    assert_same_step(found, expected(), tolerance=1e-12)
    ends["ran"] += 1
