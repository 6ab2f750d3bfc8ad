"""An independent checker: exact fractions, its own rules, and no code of Evenflow but the nouns.

It repeats until nothing changes: it walks over all ranks and times what can run, as slowly as it is simple.
"""

from fractions import Fraction

from evenflow.ir import Backward, Costs, Flow, Forward, InputGrad, Overlap, Schedule, WeightGrad

Fact = tuple[str, int, int]  # what is made ("F", "I" or "W"), stage, microbatch


def made_by(op) -> list[Fact]:
    if isinstance(op, Overlap):
        return made_by(op.first) + made_by(op.second)
    letters = {Forward: "F", InputGrad: "I", WeightGrad: "W", Backward: "IW"}[type(op)]
    return [(letter, op.stage, op.microbatch) for letter in letters]


def needed_by(op, flow: Flow) -> list[tuple[Fact, int]]:
    """The facts that an op waits for, each with the stage where it must be."""
    if isinstance(op, Overlap):
        return needed_by(op.first, flow) + needed_by(op.second, flow)
    stage, microbatch = op.stage, op.microbatch
    if isinstance(op, Forward):
        return [(("F", source, microbatch), stage) for source, target in flow.activations if target == stage]
    if isinstance(op, WeightGrad):
        return [(("I", stage, microbatch), stage)]
    later = [(("I", source, microbatch), stage) for source, target in flow.gradients if target == stage]
    return [(("F", stage, microbatch), stage), *later]


def seconds(op, costs: Costs) -> Fraction:
    if isinstance(op, Overlap):
        return Fraction(costs.overlap_share) * (seconds(op.first, costs) + seconds(op.second, costs))
    prices = {"F": costs.forward_seconds, "I": costs.input_grad_seconds, "W": costs.weight_grad_seconds}
    return sum((Fraction(prices[letter][stage]) for letter, stage, _ in made_by(op)), Fraction(0))


def times(schedule: Schedule, flow: Flow, costs: Costs) -> list[list[tuple[Fraction, Fraction]]] | None:
    """The exact (start, end) of each op of each rank; None if they can't all run."""
    rank_of = schedule.placement.rank_of
    lanes: list[list[tuple[Fraction, Fraction]]] = [[] for _ in schedule.ranks]
    there: dict[tuple[Fact, int], Fraction] = {}
    link_free: dict[tuple[int, int], Fraction] = {}
    changed = True
    while changed:
        changed = False
        for rank, queue in enumerate(schedule.ranks):
            if len(lanes[rank]) == len(queue):
                continue
            op = queue[len(lanes[rank])]
            needed = needed_by(op, flow)
            if any(key not in there for key in needed):
                continue
            start = max([lanes[rank][-1][1] if lanes[rank] else Fraction(0), *(there[key] for key in needed)])
            end = start + seconds(op, costs)
            lanes[rank].append((start, end))
            changed = True
            for fact in made_by(op):
                there[fact, fact[1]] = end
                edges = {"F": flow.activations, "I": flow.gradients, "W": ()}[fact[0]]
                for source, target in sorted(edges):
                    if source != fact[1]:
                        continue
                    if rank_of[target] == rank:
                        there[fact, target] = end
                        continue
                    link = costs.links.get((rank, rank_of[target]), costs.link)
                    size = Fraction(costs.sent_bytes.get((source, target), 0.0))
                    rate = link.bytes_per_second
                    occupied = Fraction(0) if rate == float("inf") else size / Fraction(rate)
                    left = max(end, link_free.get((rank, rank_of[target]), Fraction(0))) + occupied
                    link_free[rank, rank_of[target]] = left
                    there[fact, target] = left + Fraction(link.latency_seconds)
    if any(len(lane) < len(queue) for lane, queue in zip(lanes, schedule.ranks, strict=True)):
        return None
    return lanes


def is_complete(schedule: Schedule) -> bool:
    """Whether each rank makes all that its stages must make, once, and nothing else."""
    rank_of = schedule.placement.rank_of
    found = sorted(
        (fact, rank) for rank, queue in enumerate(schedule.ranks) for op in queue for fact in made_by(op)
    )
    trains = any(fact[0] != "F" for fact, _ in found)
    wanted = sorted(
        ((letter, stage, microbatch), rank_of[stage])
        for letter in ("FIW" if trains else "F")
        for stage in range(len(rank_of))
        for microbatch in range(schedule.num_microbatches)
    )
    return found == wanted


def peaks(schedule: Schedule, costs: Costs) -> list[Fraction]:
    """The most that each rank holds."""
    highest = []
    for queue in schedule.ranks:
        held = peak = Fraction(0)
        for op in queue:
            facts = made_by(op)
            held += sum(
                Fraction(costs.activation_bytes[stage]) for letter, stage, _ in facts if letter == "F"
            )
            peak = max(peak, held)
            for letter, stage, _ in facts:
                whole, kept = (
                    Fraction(costs.activation_bytes[stage]),
                    Fraction(costs.weight_grad_bytes[stage]),
                )
                held -= {"F": Fraction(0), "I": whole - kept, "W": kept}[letter]
        highest.append(peak)
    return highest
