"""What partitions are, said again in the plainest way: try them all."""

import itertools
import random

from evenflow.ir.placement import Placement
from evenflow.plan.chain import Held
from evenflow.plan.cuts.problem import Kind, PartitionProblem

NEAR = 1 + 1e-9


def every(problem):
    """Yield (cuts, devices, loads, needs, bytes) of all partitions in all orders of devices."""
    num_ranks, num_stages = problem.placement.num_ranks, problem.placement.num_stages
    orders = [tuple(range(num_ranks))]
    if problem.any_order:
        orders = list(itertools.permutations(range(num_ranks)))
    places = [c for c in range(1, problem.num_nodes) if problem.legal[c]]
    for cuts in itertools.combinations(places, num_stages - 1):
        for devices in orders:
            yield cuts, devices, *judged(problem, cuts, devices)


def judged(problem, cuts, devices):
    """Return the loads and needs of all ranks, and the bytes sent."""
    rank_of, bounds = problem.placement.rank_of, (0, *cuts, problem.num_nodes)
    loads, needs = [0.0] * len(devices), [0.0] * len(devices)
    transients, sent = [0.0] * len(devices), 0.0
    for stage, (a, b) in enumerate(itertools.pairwise(bounds)):
        rank, inside = rank_of[stage], set(range(a, b))
        loads[rank] += sum(problem.kinds[devices[rank]].seconds[a:b])
        needs[rank] += sum(g.num_bytes for g in problem.static if inside & set(g.nodes))
        needs[rank] += problem.in_flight[stage] * sum(
            g.num_bytes for g in problem.held if inside & set(g.nodes)
        )
        transients[rank] = max(transients[rank], *problem.transient_bytes[a:b])
    for stage, cut in enumerate(cuts):
        if rank_of[stage] != rank_of[stage + 1]:
            loads[rank_of[stage]] += problem.cut_seconds[cut]
            loads[rank_of[stage + 1]] += problem.cut_seconds[cut]
            sent += problem.cut_bytes[cut]
    return loads, [need + transient for need, transient in zip(needs, transients, strict=True)], sent


def ratio(problem, devices, needs):
    return max(need / problem.kinds[device].cap_bytes for need, device in zip(needs, devices, strict=True))


def best_of(problem):
    """Return (most, second, bytes) of the best partition that fits, or None; and the least ratio to cap."""
    partitions = list(every(problem))
    fitting = [
        (*sorted([0.0, *loads], reverse=True)[:2], sent)
        for _, devices, loads, needs, sent in partitions
        if ratio(problem, devices, needs) <= NEAR
    ]
    least_ratio = min(ratio(problem, devices, needs) for _, devices, _, needs, _ in partitions)
    for place in range(2):  # loads that differ by rounding alone are the same
        least = min((score[place] for score in fitting), default=0.0)
        fitting = [score for score in fitting if score[place] <= least * NEAR]
    return min(fitting, key=lambda score: score[2], default=None), least_ratio


def random_problem(seed, shape):
    """Return a problem of few nodes: ties and zeros, illegal cuts, groups, caps that bind, mixed devices."""
    chance = random.Random(seed)
    num_ranks = chance.randint(1, 4 if shape == "linear" else 3)
    if shape == "linear":
        placement = Placement.linear(num_ranks)
    elif shape == "V":
        placement = Placement.v_shape(num_ranks)
    else:
        placement = Placement.looped(num_ranks, chance.randint(2, 3 if num_ranks < 3 else 2))
    num_stages = placement.num_stages
    size = chance.randint(num_stages, max(num_stages + 3, 8))
    unit = chance.choice([1.0, 0.1, 1e-6])
    base = [chance.choice([0, 0, 1, 1, 1, 2, 3, 10]) * unit for _ in range(size)]
    if chance.random() < 0.3:
        base = [chance.random() for _ in range(size)]
    legal = [True] * size
    for place in chance.sample(range(1, size), k=min(chance.choice([0, 0, 1, 2]), size - num_stages)):
        legal[place] = False
    static, held = ([_group(chance, size) for _ in range(chance.randint(0, 8))] for _ in range(2))
    problem = PartitionProblem(
        placement,
        _kinds(chance, base, num_ranks, None),
        tuple(legal),
        tuple(float(chance.randint(0, 9)) for _ in range(size)),
        tuple(chance.choice([0, 0, 1, 2]) * unit * chance.choice([0, 1]) for _ in range(size)),
        tuple(static),
        tuple(held),
        tuple(float(chance.choice([0, 0, 3, 7])) for _ in range(size)),
        tuple(chance.choice([1.0, 2.0, 2.5, 4.0]) for _ in range(num_stages)),
        any_order=chance.random() < 0.4,
    )
    if chance.random() < 0.4:
        return problem
    needs = sorted(max(needs) for _, _, _, needs, _ in every(problem))
    cap = max(needs[int(len(needs) * chance.choice([0.0, 0.05, 0.3]))] * chance.choice([0.8, 1.0, 1.1]), 0.5)
    kinds = _kinds(chance, base, num_ranks, cap)
    return PartitionProblem(
        placement,
        kinds,
        problem.legal,
        problem.cut_bytes,
        problem.cut_seconds,
        problem.static,
        problem.held,
        problem.transient_bytes,
        problem.in_flight,
        any_order=problem.any_order,
    )


def _group(chance, size):
    nodes = chance.sample(range(size), k=min(size, chance.choice([1, 1, 2, 3])))
    return Held(float(chance.randint(0, 20)), tuple(sorted(nodes)))


def _kinds(chance, base, num_ranks, cap):
    mixed = chance.random() < 0.5
    there = []
    for name in ("slow", "fast", "odd")[: 3 if mixed else 1]:
        factor = {"slow": 1.0, "fast": 0.5, "odd": 1.5}[name]
        seconds = tuple(c * (factor if name != "odd" else chance.choice([0.5, 1.0, 2.0])) for c in base)
        room = {} if cap is None else {"cap_bytes": cap * chance.choice([1.0, 1.0, 1.5] if mixed else [1.0])}
        there.append(Kind(name, seconds, **room))
    return tuple(chance.choice(there) for _ in range(num_ranks))
