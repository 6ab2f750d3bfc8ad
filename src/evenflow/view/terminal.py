"""Terminal: a timeline as lanes of coloured letters, to scale, in whatever width there is.

Colour is never all that tells: every box is filled with the letter of its kind, and begins with its name
where there is room. Where ops are narrower than two columns, each column shows what ran most of it.
"""

from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from evenflow.errors import ConfigError
from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Overlap, WeightGrad, parts
from evenflow.ir.timeline import Lane, Timeline
from evenflow.view.columns import computes, origin_seconds, slices, typical_seconds
from evenflow.view.palette import NAMES, colour, contrast, hexadecimal
from evenflow.view.units import format_seconds

_MIN_WIDTH = 40
# Neighbours of one kind differ, and both shades stay in the family's middle.
_SHADES = (0.15, 0.45)
_FILLS: dict[type[ComputeOp], str] = {
    Forward: "f",
    Backward: "b",
    InputGrad: "i",
    WeightGrad: "w",
    Overlap: "x",
}


def lanes_text(timeline: Timeline, *, width: int = 100, max_ranks: int = 24) -> Text:
    """Return a lane for each rank, the axis of time and the legend, in `width` characters.

    Of more than `max_ranks` ranks, the first and the last ones are drawn. Raises `ConfigError` for a width
    below 40.

    >>> from evenflow.ir import Costs, Flow
    >>> from evenflow.schedules.gpipe import gpipe
    >>> from evenflow.simulate import simulate
    >>> timeline = simulate(gpipe(2, 1, 2), Flow.chain(2), Costs.uniform(2))
    >>> print(lanes_text(timeline, width=56).plain)
    rank 0 |0fff1fff            0bbbbbbb1bbbbbbb|  67 % busy
    rank 1 |    0fff1fff0bbbbbbb1bbbbbbb        |  67 % busy
            0                             9.00 s
            f forward   b backward
    """
    if width < _MIN_WIDTH:
        raise ConfigError(f"width must be at least {_MIN_WIDTH} characters, got {width}")
    ranks = list(range(timeline.num_ranks))
    left_out = max(0, len(ranks) - max_ranks)
    if left_out:
        ranks = ranks[: max_ranks - max_ranks // 2] + ranks[len(ranks) - max_ranks // 2 :]
    head = f"rank {len(str(ranks[-1])) * '0'}"
    num_columns = width - len(head) - len(" |") - len("| 100 % busy")
    makespan = timeline.makespan_seconds
    column_seconds = makespan / num_columns
    lanes = [timeline.lanes[rank] for rank in ranks]
    is_dense = 0 < typical_seconds(lanes) < 2 * column_seconds
    scale = _Scale(origin_seconds(timeline), column_seconds, num_columns)
    drawn = _dense_lanes(lanes, scale) if is_dense else _roomy_lanes(lanes, scale)
    text = Text()
    for place, (rank, lane, cells) in enumerate(zip(ranks, lanes, drawn, strict=True)):
        if left_out and place and rank != ranks[place - 1] + 1:
            text.append(f"{'…'.rjust(len(head))}  {left_out} ranks between are not drawn\n", "dim")
        text.append(f"{f'rank {rank}'.ljust(len(head))} |").append_text(_styled(cells))
        busy = lane.busy_seconds / makespan if makespan > 0 else 0.0
        text.append(f"| {busy * 100:3.0f} % busy\n")
    margin = " " * (len(head) + 2)
    text.append(f"{margin}0{format_seconds(makespan).rjust(num_columns - 1)}\n", "dim")
    text.append(margin).append_text(_legend(lanes))
    if is_dense:
        text.append(f"\n{margin}each column is {format_seconds(column_seconds)}: what ran most of it", "dim")
    return text


@dataclass(frozen=True, slots=True)
class _Scale:
    origin: float
    column_seconds: float
    num_columns: int


@dataclass(frozen=True, slots=True)
class _Cell:
    letter: str
    kind: type[ComputeOp]
    shade: float


def _roomy_lanes(lanes: list[Lane], scale: _Scale) -> list[list[_Cell | None]]:
    """Draw each op as a box of its own."""
    boxes = [[_box(scale, *compute) for compute in computes(lane)] for lane in lanes]
    several_stages = any(len({part.stage for op, _, _ in own for part in parts(op)}) > 1 for own in boxes)
    # One form of name for all boxes of a kind, or the eye takes the difference for a meaning.
    names = {}
    for kind in _FILLS:
        alike = [(op, end - start) for own in boxes for op, start, end in own if isinstance(op, kind)]
        for full in (True, False) if several_stages or kind is Overlap else (False,):
            if kind not in names and all(len(_name(op, full=full)) < width for op, width in alike):
                names[kind] = full
    drawn = []
    for own in boxes:
        cells: list[_Cell | None] = [None] * scale.num_columns
        for op, start, end in own:
            kind = type(op)
            name = _name(op, full=names[kind]) if kind in names else ""
            letters = name.ljust(end - start, _FILLS[kind])
            shade = _SHADES[parts(op)[0].microbatch % 2]
            cells[start:end] = [_Cell(letter, kind, shade) for letter in letters]
        drawn.append(cells)
    return drawn


def _box(scale: _Scale, op: ComputeOp, start: float, end: float) -> tuple[ComputeOp, int, int]:
    """Return the columns of an op; both ends are rounded alike, so that neighbours do not overlap."""
    if scale.column_seconds == 0:
        return op, 0, 1
    left = min(round((start - scale.origin) / scale.column_seconds), scale.num_columns - 1)
    right = round((end - scale.origin) / scale.column_seconds)
    return op, left, min(max(left + 1, right), scale.num_columns)  # even the shortest gets a column


def _name(op: ComputeOp, *, full: bool) -> str:
    return str(op) if full else "&".join(str(part.microbatch) for part in parts(op))


def _dense_lanes(lanes: list[Lane], scale: _Scale) -> list[list[_Cell | None]]:
    """Draw in each column the kind that ran most of it, or nothing where idleness did."""
    drawn = []
    for lane in lanes:
        shares: list[dict[type[ComputeOp], float]] = [{} for _ in range(scale.num_columns)]
        for column, op, share in slices(
            lane,
            origin=scale.origin,
            column_seconds=scale.column_seconds,
            num_columns=scale.num_columns,
        ):
            shares[column][type(op)] = shares[column].get(type(op), 0.0) + share
        drawn.append([_most(column) for column in shares])
    return drawn


def _most(shares: dict[type[ComputeOp], float]) -> _Cell | None:
    if sum(shares.values()) < 0.5:
        return None
    kind = max(shares, key=lambda kind: shares[kind])
    return _Cell(_FILLS[kind], kind, _SHADES[0])


def _styled(cells: list[_Cell | None]) -> Text:
    text = Text()
    for style, run in groupby(cells, key=lambda cell: "" if cell is None else _style(cell.kind, cell.shade)):
        text.append("".join(" " if cell is None else cell.letter for cell in run), style)
    return text


def _style(kind: type[ComputeOp], shade: float) -> str:
    ground = colour(kind, shade)
    return f"{hexadecimal(contrast(ground))} on {hexadecimal(ground)}"


def _legend(lanes: list[Lane]) -> Text:
    used = {type(op) for lane in lanes for op, _, _ in computes(lane)}
    text = Text()
    for kind, letter in _FILLS.items():
        if kind in used:
            text.append("   " if text else "").append(f"{letter} {NAMES[kind]}", _style(kind, _SHADES[0]))
    return text
