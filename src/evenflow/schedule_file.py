"""Schedule file: a schedule as text that a person can edit, by hand or in a spreadsheet.

It is CSV: a row for each rank, in order, and in its cells the rank's compute ops in the order in which they
run, written as `2F0` (stage 2, forward, microbatch 0; B, I and W are the whole backward and its two halves)
and `2F3&5B1` (two fused). Empty cells and rows count for nothing, so that ops may be aligned by time. Lines
that begin with `#` are comments; two of them say something:

    # name: my-schedule
    # placement: 0,1,1,0

The placement is the rank of each stage. Where it is left out, a stage is on the rank whose row names it. The
number of microbatches is what the ops say.

Files of torch.distributed.pipelining are read too (`torch_cells` says what differs), but for those with
communication in them, which are refused: Evenflow, like torch, places its own.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evenflow.errors import ConfigError, listed
from evenflow.foreign import read_text, shown
from evenflow.ir.op import ComputeOp, Op, parse_op, parts
from evenflow.ir.placement import Placement
from evenflow.ir.schedule import Schedule
from evenflow.torch_cells import is_added_by_torch, parse_torch_fused

_KEYS = ("name", "placement")
_MOST_LETTERS = 200  # of a name


def format_schedule(schedule: Schedule) -> str:
    """Return the text of a schedule; the inverse of `parse_schedule`.

    Raises `ConfigError` for a name that is empty, too long, has spaces around it, or is not one line of
    printable characters.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> print(format_schedule(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=2)), end="")
    # name: gpipe
    # placement: 0,1
    0F0,0F1,0B0,0B1
    1F0,1F1,1B0,1B1
    """
    name = schedule.name
    if not name or name != name.strip() or not _is_name(name):
        raise ConfigError(f"a schedule's name must be one line without spaces around it, got {shown(name)}")
    lines = [f"# name: {name}", f"# placement: {','.join(map(str, schedule.placement.rank_of))}"]
    lines += format_rows(schedule)
    return "\n".join(lines) + "\n"


def format_rows(schedule: Schedule) -> list[str]:
    """Return the row of each rank.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> format_rows(gpipe(num_ranks=2, stages_per_rank=1, num_microbatches=2))
    ['0F0,0F1,0B0,0B1', '1F0,1F1,1B0,1B1']
    """
    return [",".join(map(str, queue)) for queue in schedule.ranks]


def parse_schedule(text: str, *, name: str) -> Schedule:
    r"""Read a schedule from its text; `name` is its name where the text gives none.

    Raises `ConfigError` that tells all faults, each with its line and its column (of the table: column 2 is
    the second cell) and what to write there. Whether the ops are complete and can be executed is judged by
    `simulate`.

    >>> schedule = parse_schedule("0F0, 0B0\n1F0, 1B0\n", name="mine")
    >>> schedule.placement.rank_of, schedule.num_microbatches, [str(op) for op in schedule.ranks[1]]
    ((0, 1), 1, ['1F0', '1B0'])
    >>> parse_schedule("0F0, 0C0", name="mine")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    evenflow.errors.ConfigError: 1 fault:
      - line 1, column 2: '0C0' is not a compute op: write stage, one of F, B, I and W, ...
    """
    table = _Table(text)
    faults = table.faults
    if not any(table.rows) and not faults:
        faults.append("no row holds an op: write a line for each rank, such as '0F0,0F1,0B0,0B1'")
    placement = None
    # What follows from the ops is only worth telling once all of them can be read.
    if not faults:
        placement = table.placement()
    if not faults:
        faults += table.missing_microbatches()
    if faults or placement is None:
        raise _refusal(faults)
    ranks = tuple(tuple(cell.op for cell in row) for row in table.rows)
    num_microbatches = 1 + max(part.microbatch for queue in ranks for op in queue for part in parts(op))
    return Schedule(table.name or name, placement, num_microbatches, ranks)


def read_schedule_file(path: Path) -> Schedule:
    """Read a schedule from a file; `ConfigError` as `parse_schedule`, and for a file that can't be read."""
    text = read_text(path, "schedule")
    try:
        return parse_schedule(text, name=path.stem)
    except ConfigError as error:
        raise ConfigError(f"cannot read the schedule {path}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Cell:
    op: ComputeOp
    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.op}"


class _Table:
    """The text, read cell by cell; `faults` grows as it is asked."""

    def __init__(self, text: str) -> None:
        self.faults: list[str] = []
        self.rows: list[list[_Cell]] = []
        self.name: str | None = None
        self.given: tuple[int, tuple[int, ...]] | None = None  # the placement, with its line before it
        for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
            # A spreadsheet may put a comment in quotes, and commas behind it.
            stripped = line.strip()
            if stripped.lstrip('"').startswith("#"):
                self._comment(number, stripped)
            elif stripped.strip(', \t"'):
                self._row(number, stripped)

    def _comment(self, number: int, line: str) -> None:
        key, colon, value = line.strip('",').lstrip("# \t").partition(":")
        key, value = key.strip().lower(), value.strip(' \t",')
        if not colon:
            return
        if key == "name":
            self.name = value
            if not _is_name(value):
                self.faults.append(
                    f"line {number}: {shown(value)} is no name: write up to {_MOST_LETTERS} printable letters"
                )
        elif key == "placement":
            words = [word.strip() for word in value.split(",")]
            if all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
                self.given = number, tuple(map(int, words))
            else:
                self.faults.append(
                    f"line {number}: {shown(value)} is no placement: write the rank of each stage, '0,1,1,0'"
                )
        elif nearest := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.7):
            self.faults.append(f"line {number}: {shown(key)} is no key; did you mean '# {nearest[0]}: ...'?")

    def _row(self, number: int, line: str) -> None:
        row = []
        for column, cell in enumerate(line.split(","), start=1):
            word = cell.strip(' \t"')
            if not word:
                continue
            op: Op | None
            try:
                op = parse_op(word)
            except ConfigError:
                op = parse_torch_fused(word)
            if isinstance(op, ComputeOp):
                row.append(_Cell(op, number, column))
            else:
                self.faults.append(f"line {number}, column {column}: {shown(word)} is {_what_else(word, op)}")
        self.rows.append(row)

    def _stages(self) -> Iterator[tuple[int, _Cell, int]]:
        for rank, row in enumerate(self.rows):
            for cell in row:
                for part in parts(cell.op):
                    yield rank, cell, part.stage

    def placement(self) -> Placement | None:
        return self._inferred_placement() if self.given is None else self._given_placement(*self.given)

    def _given_placement(self, line: int, rank_of: tuple[int, ...]) -> Placement | None:
        try:
            placement = Placement(rank_of)
        except ConfigError as error:
            self.faults.append(f"line {line}: {error}")
            return None
        if len(self.rows) != placement.num_ranks:
            self.faults.append(
                f"the placement of line {line} names {placement.num_ranks} ranks, and there "
                f"are {len(self.rows)} rows: write a row for each rank"
            )
        for rank, cell, stage in self._stages():
            if stage >= placement.num_stages:
                self.faults.append(
                    f"{cell} is of stage {stage}, and the placement names stages "
                    f"0..{placement.num_stages - 1}: add its rank in line {line}"
                )
            elif placement.rank_of[stage] != rank:
                self.faults.append(
                    f"{cell} stands in the row of rank {rank}, and stage {stage} lives on rank "
                    f"{placement.rank_of[stage]}: move it there"
                )
        return placement

    def _inferred_placement(self) -> Placement | None:
        homes: dict[int, tuple[int, _Cell]] = {}
        for rank, cell, stage in self._stages():
            home, first = homes.setdefault(stage, (rank, cell))
            if home != rank:
                self.faults.append(
                    f"{cell} stands in the row of rank {rank}, and stage {stage} is on rank {home} since "
                    f"line {first.line}, column {first.column}: keep a stage in one row"
                )
        self.faults += [
            f"no row holds an op of stage {stage}, and there is one of stage {max(homes)}: count stages from "
            "0"
            for stage in _gaps(set(homes))
        ]
        if self.faults:
            return None
        return Placement(tuple(homes[stage][0] for stage in range(len(homes))))

    def missing_microbatches(self) -> list[str]:
        cells = {part.microbatch: cell for row in self.rows for cell in row for part in parts(cell.op)}
        return [
            f"{cells[max(cells)]} is of microbatch {max(cells)}, and no op is of microbatch {gap}: count "
            "microbatches from 0"
            for gap in _gaps(set(cells))
        ]


def _what_else(word: str, op: Op | None) -> str:
    """What a cell is that holds no compute op, and what to do about it."""
    if op is not None:
        return "added by Evenflow, and no part of a schedule: leave it out"
    if is_added_by_torch(word):
        return (
            "communication of torch's, and Evenflow places its own: let torch write the file without, "
            '`schedule._dump_csv(file, format="compute_only")`'
        )
    return "not a compute op: write stage, one of F, B, I and W, microbatch ('2F0'), or two fused ('2F3&5B1')"


def _is_name(text: str) -> bool:
    """Whether this can be told in one line, and no terminal obeys it."""
    return text.isprintable() and len(text) <= _MOST_LETTERS


def _gaps(numbers: set[int]) -> list[int]:
    """Return the first number from 0 up that is missing below the highest, if any is."""
    if len(numbers) == max(numbers) + 1:
        return []
    return [next(number for number in range(len(numbers)) if number not in numbers)]


def _refusal(faults: list[str]) -> ConfigError:
    head = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}:"
    return ConfigError("\n".join([head, *listed(faults)]))
