"""The shortest schedule of a small instance, found by search: what the lower bounds are held against.

Two independent ways: CP-SAT for any small instance, and every order of two ranks by brute force, which needs
no solver and so checks the model of the first.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal

from ortools.sat.python import cp_model

from evenflow.bounds import Instance

Objective = Literal["span", "makespan"]
Op = tuple[str, int, int]


def optimum(instance: Instance, objective: Objective, limit_seconds: float = 20.0) -> int | None:
    """Return the least span or makespan of an instance in whole numbers; None if time ran out.

    Microbatches are alike, so the i-th forward (input gradient, weight gradient) of a stage may be called
    microbatch i: sorting keeps every rule, and memory only counts. Hence each kind of each stage is in order.
    """
    model = cp_model.CpModel()
    num_stages, num_microbatches = instance.placement.num_stages, instance.num_microbatches
    ranks = range(instance.placement.num_ranks)
    works = (instance.forward_seconds, instance.input_grad_seconds, instance.weight_grad_seconds)
    once = sum(map(sum, works)) + sum(instance.up_seconds) + sum(instance.down_seconds)
    horizon = int(num_microbatches * once)
    start: dict[Op, cp_model.IntVar] = {}
    end: dict[Op, cp_model.LinearExpr] = {}
    intervals: dict[int, list[cp_model.IntervalVar]] = {rank: [] for rank in ranks}
    for kind, seconds in zip("FIW", works, strict=True):
        for stage, microbatch in itertools.product(range(num_stages), range(num_microbatches)):
            op, length = (kind, stage, microbatch), int(seconds[stage])
            start[op] = model.new_int_var(0, horizon, str(op))
            end[op] = start[op] + length
            if length:
                intervals[instance.placement.rank_of[stage]].append(
                    model.new_fixed_size_interval_var(start[op], length, f"run {op}")
                )
            if microbatch:
                model.add(start[op] >= end[(kind, stage, microbatch - 1)])
    for stage, microbatch in itertools.product(range(num_stages), range(num_microbatches)):
        forward, input_grad = ("F", stage, microbatch), ("I", stage, microbatch)
        model.add(start[input_grad] >= end[forward])
        model.add(start[("W", stage, microbatch)] >= end[input_grad])
        if stage:
            before = ("F", stage - 1, microbatch)
            model.add(start[forward] >= end[before] + int(instance.up_seconds[stage - 1]))
            model.add(
                start[("I", stage - 1, microbatch)] >= end[input_grad] + int(instance.down_seconds[stage - 1])
            )
    for rank, on_rank in intervals.items():
        model.add_no_overlap(on_rank)
        _limit_memory(model, instance, rank, start, end, horizon)
    model.minimize(_objective(model, instance, objective, start, end, horizon))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = limit_seconds
    status = solver.solve(model)
    return round(solver.objective_value) if status == cp_model.OPTIMAL else None


def _limit_memory(
    model: cp_model.CpModel,
    instance: Instance,
    rank: int,
    start: dict[Op, cp_model.IntVar],
    end: dict[Op, cp_model.LinearExpr],
    horizon: int,
) -> None:
    cap = instance.caps[rank]
    if cap == math.inf:
        return
    held, demands = [], []
    stages = instance.placement.stages_on(rank)
    for stage, microbatch in itertools.product(stages, range(instance.num_microbatches)):
        kept = int(instance.kept_memory[stage])
        for last, demand in (("I", int(instance.held_memory[stage]) - kept), ("W", kept)):
            if demand:
                size = model.new_int_var(0, horizon, "")
                begin, finish = start[("F", stage, microbatch)], end[(last, stage, microbatch)]
                held.append(model.new_interval_var(begin, size, finish, ""))
                demands.append(demand)
    model.add_cumulative(held, demands, int(cap))


def _objective(
    model: cp_model.CpModel,
    instance: Instance,
    objective: Objective,
    start: dict[Op, cp_model.IntVar],
    end: dict[Op, cp_model.LinearExpr],
    horizon: int,
) -> cp_model.IntVar:
    longest = model.new_int_var(0, horizon, "longest")
    ranks = range(instance.placement.num_ranks)
    groups = [ranks] if objective == "makespan" else [[rank] for rank in ranks]
    for group in groups:
        first = model.new_int_var(0, horizon, "")
        ops = [op for op in start if instance.placement.rank_of[op[1]] in group]
        model.add_min_equality(first, [start[op] for op in ops])
        for op in ops:
            model.add(longest >= end[op] - first)
    return longest


def brute_force(instance: Instance) -> tuple[float, float] | None:
    """Return the least span and makespan of an instance of two ranks, one stage each, over all orders.

    Two serial orders make one graph of waits. With longest paths P(a, b) from the first op of rank a to the
    end of rank b, windows of length w exist if and only if P(0,0) <= w, P(1,1) <= w and
    P(0,1) + P(1,0) <= 2w: these are the cycles of the system start_r >= end_r - w.
    """
    assert instance.placement.rank_of == (0, 1)
    found: list[tuple[float, float]] = []
    for queues in itertools.product(_orders(instance, 0), _orders(instance, 1)):
        paths = [_longest_paths(instance, queues, source) for source in (0, 1)]
        whole = _longest_paths(instance, queues, None)
        if whole is not None and None not in paths:
            (p00, p01), (p10, p11) = paths
            found.append((max(p00, p11, (p01 + p10) / 2), max(whole)))
    if not found:
        return None
    return min(span for span, _ in found), min(makespan for _, makespan in found)


def _orders(instance: Instance, stage: int) -> Iterator[tuple[Op, ...]]:
    """Yield every serial order of one stage's ops that keeps the rules and the cap."""
    held, kept, cap = instance.held_memory[stage], instance.kept_memory[stage], instance.caps[stage]

    def extend(done: tuple[Op, ...], forwards: int, inputs: int, weights: int) -> Iterator[tuple[Op, ...]]:
        if weights == instance.num_microbatches:
            yield done
        memory = (forwards - inputs) * held + (inputs - weights) * kept
        if forwards < instance.num_microbatches and memory + held <= cap:
            yield from extend((*done, ("F", stage, forwards)), forwards + 1, inputs, weights)
        if inputs < forwards:
            yield from extend((*done, ("I", stage, inputs)), forwards, inputs + 1, weights)
        if weights < inputs:
            yield from extend((*done, ("W", stage, weights)), forwards, inputs, weights + 1)

    return extend((), 0, 0, 0)


def _longest_paths(
    instance: Instance, queues: tuple[tuple[Op, ...], ...], source: int | None
) -> list[float] | None:
    """Return when each rank ends if `source` may start at 0, or, for None, both; None for a deadlock."""
    never = float("-inf")
    ends: dict[Op, float] = {}
    works = {
        "F": instance.forward_seconds,
        "I": instance.input_grad_seconds,
        "W": instance.weight_grad_seconds,
    }
    at, free = [0, 0], [never if source is not None else 0.0] * 2
    if source is not None:
        free[source] = 0.0
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while at[rank] < len(queue):
                kind, stage, microbatch = op = queue[at[rank]]
                waits: list[tuple[Op, float]] = []
                if kind == "F" and stage == 1:
                    waits = [(("F", 0, microbatch), instance.up_seconds[0])]
                elif kind == "I":
                    waits = [(("F", stage, microbatch), 0.0)]
                    if stage == 0:
                        waits.append((("I", 1, microbatch), instance.down_seconds[0]))
                elif kind == "W":
                    waits = [(("I", stage, microbatch), 0.0)]
                if any(wait not in ends for wait, _ in waits):
                    break
                begin = max([free[rank], *(ends[wait] + delay for wait, delay in waits)])
                ends[op] = free[rank] = begin + works[kind][stage]
                at[rank] += 1
                moved = True
    return free if at == [len(queue) for queue in queues] else None
