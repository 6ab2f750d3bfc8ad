"""The one report of a wait that took too long: who waited where, for whom, and what each rank was doing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from evenflow.runtime.notes.board import Position
from evenflow.runtime.ranks.beats import Beat, Blame

SIGN = "evenflow's watchdog: "  # what each report begins with


@dataclass(frozen=True, slots=True)
class Sight:
    """What a rank sees of another one's process, on the same host: its state, and what its board says."""

    state: str | None
    position: Position | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rank tells when the alarm is raised; `sights` are those of silent ranks, by rank."""

    beat: Beat
    stacks: str
    sights: Mapping[int, Sight] = field(default_factory=dict)

    def told(self) -> str:
        """As text, for `answered`."""
        return json.dumps(asdict(self))


def answered(told: str | bytes) -> Answer:
    """The answer that `told` made text of."""
    found = json.loads(told)
    sights = {
        int(rank): Sight(sight["state"], None if sight["position"] is None else Position(**sight["position"]))
        for rank, sight in found["sights"].items()
    }
    return Answer(Beat(**found["beat"]), found["stacks"], sights)


def report(
    blamed: Blame, beats: Mapping[int, Beat], answers: Mapping[int, Answer], *, timeout_seconds: float
) -> str:
    """The report: a paragraph that says it all, an empty line, and what is known of each rank.

    `beats` are those on which the alarm was raised, `answers` those of the ranks that answered it.
    """
    now = {**beats, **{rank: answer.beat for rank, answer in answers.items()}}
    last = {**now, **beats}
    sights = {rank: sight for answer in answers.values() for rank, sight in answer.sights.items()}
    in_op = (beat for _, beat in sorted(last.items()) if beat.op and {*beat.waits_for} & {*blamed.culprits})
    waiter = next(in_op, last[blamed.waiter])  # who waits in an op knows for what
    waited = f"waited {waiter.stood_seconds:.1f} s (timeout: {timeout_seconds:g} s)"
    waited_for = f"{_listed(waiter.waits_for)}: {waiter.waits_on}"
    found = [f"rank {waiter.rank} ({waiter.host}) {waited} {waiter.at} for {waited_for}"]
    found += [_culprit(rank, last.get(rank), sights.get(rank), blamed) for rank in blamed.culprits]
    if not blamed.culprits:
        found.append(_ring([beat.waits_on for beat in last.values() if beat.waits_for]))
    elif not blamed.silent:
        found.append(
            "if that may take so long, let the others wait: evenflow.pipeline(timeout=SECONDS), or timeout "
            "under [pipeline]"
        )
    known = [
        _known(rank, now.get(rank), sights.get(rank), answers.get(rank))
        for rank in sorted({*now, *blamed.culprits})
    ]
    return "\n".join([SIGN + "; ".join(found), "", *known])


def _ring(waits: Sequence[str]) -> str:
    if len(waits) > 1 and len(set(waits)) == 1:
        return "all wait for the same: what they do together does not end (a slow disk, the network)"
    return "each rank waits for another one: they do not do the same things in the same order"


def _culprit(rank: int, beat: Beat | None, sight: Sight | None, blamed: Blame) -> str:
    if beat is None:
        return f"rank {rank} has given no sign of life at all"
    if beat.has_left:
        return f"{beat.who} has closed its pipeline, or come to its end"
    if not blamed.silent:
        line = f", at {beat.line}," if beat.line else ""
        return f"{beat.who} has stood {beat.at}{line} for {beat.stood_seconds:.1f} s, and waits for no rank"
    if sight is None:
        return f"{beat.who} gives no sign of life; it was last {beat.at}"
    state = f": its process {sight.state}" if sight.state else ""
    at = beat.at if sight.position is None else sight.position.text
    return f"{beat.who} gives no sign of life{state}, {at}"


def _known(rank: int, beat: Beat | None, sight: Sight | None, answer: Answer | None) -> str:
    """All that is known of a rank, in lines."""
    if beat is None:
        return f"rank {rank}: nothing is known"
    at, before = beat.at, beat.before
    if sight is not None and sight.position is not None:
        at, before = sight.position.text, sight.position.before
    waits = ""
    if answer is not None:
        waits = f" for {beat.stood_seconds:.1f} s"
        if beat.waits_for:
            waits += f", waits for {_listed(beat.waits_for)}: {beat.waits_on}"
        elif beat.line:
            waits += f", at {beat.line}"
    lines = [f"{beat.who}: {at}{waits}"]
    if before:
        lines.append(f"  ops before that: {' '.join(before)}")
    if answer is None:
        state = f": its process {sight.state}" if sight is not None and sight.state else ""
        lines.append(f"  it did not answer{state}")
    else:
        lines += [f"  {line}" for line in answer.stacks.splitlines()]
    return "\n".join(lines)


def _listed(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
