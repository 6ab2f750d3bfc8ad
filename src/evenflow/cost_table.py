"""Cost table: times that somebody has measured, per rank or per layer, read from a CSV. No model is needed.

The header says which it is, and in which units:

    rank,forward_ms,input_grad_ms,weight_grad_ms        layer,forward_ms,input_grad_ms,weight_grad_ms
    0,10.5,11.0,8.25                                    embedding,0.5,0.1,0.4
    1,9.75,10.5,8.0                                     block 0,3.0,3.25,2.75

Times may end in `_seconds` (as without a unit), `_s`, `_ms` or `_us`. Further columns, if wanted:
`activation`, what one microbatch holds from its forward on; `weight_activation`, what is left of it for the
weight gradient (by default all of it); `cap`, what a rank may hold (per rank only); `output`, what a layer
sends to the next (per layer only). These may end in `_bytes`, `_kib`, `_mib` or `_gib`; without a unit they
are in any one.
"""

import csv
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from evenflow.errors import ConfigError, listed
from evenflow.foreign import read_text, shown
from evenflow.ir.costs import Costs, Link
from evenflow.ir.placement import Placement
from evenflow.plan.chain import Chain, Held, Seconds
from evenflow.plan.cuts.partition import balanced_cuts

_LARGEST = 1e90  # sums of such costs, and products with times, are still finite
_TIME_UNITS = {"": 1.0, "seconds": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_SIZE_UNITS = {"": 1.0, "bytes": 1.0, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_TIMES = ("forward", "input_grad", "weight_grad")
_OPTIONAL = {
    "rank": ("activation", "weight_activation", "cap"),
    "layer": ("activation", "weight_activation", "output"),
}


@dataclass(frozen=True, slots=True)
class RankTimes:
    """What one microbatch costs on each rank, whatever the number of stages there; None: not known.

    `in_bytes` tells whether memory is in bytes, or in a unit that only its owner knows.

    >>> RankTimes((2.0, 4.0), (2.0, 4.0), (1.0, 2.0), caps=(4.0, 8.0)).activation is None
    True
    """

    forward_seconds: tuple[float, ...]
    input_grad_seconds: tuple[float, ...]
    weight_grad_seconds: tuple[float, ...]
    activation: tuple[float, ...] | None = None
    weight_activation: tuple[float, ...] | None = None
    caps: tuple[float, ...] | None = None
    in_bytes: bool = False


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """What one microbatch costs in each layer, in the order of the layers; otherwise as `RankTimes`.

    `output` is what a layer sends to the next.

    >>> len(LayerTimes((1.0, 3.0), (1.0, 3.0), (0.5, 1.5), output=(8.0, 0.0)).output)
    2
    """

    forward_seconds: tuple[float, ...]
    input_grad_seconds: tuple[float, ...]
    weight_grad_seconds: tuple[float, ...]
    activation: tuple[float, ...] | None = None
    weight_activation: tuple[float, ...] | None = None
    output: tuple[float, ...] | None = None
    in_bytes: bool = False


CostTable: TypeAlias = RankTimes | LayerTimes


def price(table: CostTable, placement: Placement, *, latency_seconds: float = 0.0) -> Costs:
    """Return the costs of each stage: its share of its rank's, or those of the layers that it consists of.

    Layers are cut into stages so that the slowest stage is as fast as possible. Raises `ConfigError` for a
    table of another number of ranks, and for fewer layers than stages.

    >>> price(RankTimes((2.0,), (2.0,), (1.0,)), Placement.looped(1, 2)).weight_grad_seconds
    (0.5, 0.5)
    >>> table = LayerTimes((1.0, 1.0, 3.0), (1.0, 1.0, 3.0), (1.0, 1.0, 3.0))
    >>> price(table, Placement.linear(2)).forward_seconds
    (2.0, 3.0)
    """
    match table:
        case RankTimes():
            return _price_ranks(table, placement, latency_seconds)
        case LayerTimes():
            return _price_layers(table, placement, latency_seconds)


def chain_of(table: LayerTimes, kind: str) -> Chain:
    """Return the layers as planning sees a program: a node each, timed on one kind of device.

    A cut may stand anywhere, and a microbatch counts as one row. Of parameters and operations a table says
    nothing; memory is in bytes. Raises `ConfigError` for a table whose memory has no unit.

    >>> table = LayerTimes((1.0, 3.0), (1.0, 3.0), (0.5, 1.5), output=(8.0, 0.0), in_bytes=True)
    >>> chain = chain_of(table, "RTX 4090")
    >>> chain.seconds["RTX 4090"].total, chain.cut_bytes
    ((2.5, 7.5), (0.0, 8.0))
    """
    num_layers = len(table.forward_seconds)
    zeros = (0.0,) * num_layers
    held = table.activation or zeros
    left = table.weight_activation or held
    if not table.in_bytes and any((*held, *(table.output or ()))):
        raise ConfigError(
            "the memory of these layers has no unit: name the columns activation_mib, output_kib, and so on"
        )
    return Chain(
        names=tuple(f"layer {number}" for number in range(num_layers)),
        num_rows=1,
        flops=zeros,
        seconds={kind: Seconds(table.forward_seconds, table.input_grad_seconds, table.weight_grad_seconds)},
        saved=tuple(Held(num_bytes, (at,)) for at, num_bytes in enumerate(held) if num_bytes),
        kept=tuple(Held(num_bytes, (at,)) for at, num_bytes in enumerate(left) if num_bytes),
        cut_bytes=(0.0, *table.output[:-1]) if table.output else zeros,
    )


def capped(costs: Costs, placement: Placement, num_activations: float) -> Costs:
    """Return the costs with caps: so many times what one microbatch holds in all stages of a rank.

    >>> capped(Costs.uniform(4), Placement.v_shape(2), 1.5).memory_caps
    (3.0, 3.0)
    """
    return replace(
        costs, memory_caps=tuple(num_activations * held for held in rank_activations(costs, placement))
    )


def rank_activations(costs: Costs, placement: Placement) -> tuple[float, ...]:
    """Return what one microbatch holds in all stages of each rank together.

    >>> rank_activations(Costs.uniform(4), Placement.v_shape(2))
    (2.0, 2.0)
    """
    return tuple(
        sum(costs.activation_bytes[stage] for stage in placement.stages_on(rank))
        for rank in range(placement.num_ranks)
    )


def _price_ranks(table: RankTimes, placement: Placement, latency_seconds: float) -> Costs:
    num_ranks = len(table.forward_seconds)
    if num_ranks != placement.num_ranks:
        raise ConfigError(
            f"the costs name {num_ranks} ranks, and there are {placement.num_ranks}: give each rank one"
        )
    return Costs.of_ranks(
        placement,
        table.forward_seconds,
        table.input_grad_seconds,
        table.weight_grad_seconds,
        latency_seconds=latency_seconds,
        activation_bytes=table.activation,
        weight_grad_bytes=table.weight_activation,
        memory_caps=table.caps,
    )


def _price_layers(table: LayerTimes, placement: Placement, latency_seconds: float) -> Costs:
    num_layers, num_stages = len(table.forward_seconds), placement.num_stages
    if num_layers < num_stages:
        raise ConfigError(
            f"the costs name {num_layers} layers, and {num_stages} stages need at least as many: lower the "
            "ranks or the stages per rank"
        )
    rows = zip(table.forward_seconds, table.input_grad_seconds, table.weight_grad_seconds, strict=True)
    cuts = balanced_cuts(
        [sum(row) for row in rows],
        cut_bytes=[0.0, *table.output[:-1]] if table.output else [0.0] * num_layers,
        legal=[True] * num_layers,
        num_stages=num_stages,
    )
    bounds = (0, *cuts, num_layers)

    def summed(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(math.fsum(values[a:b]) for a, b in pairwise(bounds))

    # Without sizes each layer holds alike, so that a rank's activations of a microbatch are 1 all the same.
    activation = summed(table.activation) if table.activation else _of_one_rank(placement)
    kept = summed(table.weight_activation) if table.weight_activation else activation
    sent = {}
    if table.output:
        for stage, cut in enumerate(cuts):
            sent[stage, stage + 1] = sent[stage + 1, stage] = table.output[cut - 1]
    return Costs(
        summed(table.forward_seconds),
        summed(table.input_grad_seconds),
        summed(table.weight_grad_seconds),
        Link(latency_seconds),
        sent_bytes=sent,
        activation_bytes=activation,
        weight_grad_bytes=kept,
    )


def _of_one_rank(placement: Placement) -> tuple[float, ...]:
    return tuple(1 / len(placement.stages_on(rank)) for rank in placement.rank_of)


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    base: str
    scale: float
    has_unit: bool


def read_cost_table(path: Path) -> CostTable:
    r"""Read a table of measured costs; `ConfigError` names every fault, with its line and column.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "times.csv"
    ...     _ = path.write_text("rank,forward_ms,input_grad_ms,weight_grad_ms\n0,500,500,250\n")
    ...     read_cost_table(path).weight_grad_seconds
    (0.25,)
    """
    return _Reader(path, read_text(path, "costs").removeprefix("\ufeff")).table()


def write_layers(path: Path, names: Sequence[str], times: LayerTimes) -> None:
    r"""Write a table of layers, in milliseconds and bytes, for `read_cost_table`; `ConfigError` if it cannot.

    >>> import tempfile
    >>> times = LayerTimes((0.5, 1.0), (0.5, 1.0), (0.25, 1.0), (8.0, 4.0), (8.0, 0.0), (2.0, 0.0), True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "times.csv"
    ...     write_layers(path, ["embedding", "head"], times)
    ...     read_cost_table(path) == times
    True
    """
    columns = {
        **{f"{name}_ms": [1e3 * each for each in getattr(times, f"{name}_seconds")] for name in _TIMES},
        **{f"{name}_bytes": getattr(times, name) for name in _OPTIONAL["layer"] if getattr(times, name)},
    }
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", *columns])
            writer.writerows(zip(names, *columns.values(), strict=True))
    except OSError as error:
        raise ConfigError(f"cannot write the costs {path}: {error.strerror}") from None


class _Reader:
    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.faults: list[str] = []
        try:
            rows = list(enumerate(csv.reader(text.splitlines()), start=1))
        except csv.Error as error:
            raise ConfigError(f"the costs {path} are no CSV: {error}") from error
        self.lines = [
            (number, [cell.strip() for cell in row])
            for number, row in rows
            if any(cell.strip() for cell in row) and not row[0].lstrip().startswith("#")
        ]

    def table(self) -> CostTable:
        """Return the table, or raise with all faults."""
        if not self.lines:
            raise ConfigError(f"the costs {self.path} are empty: begin with the header {_header('rank')}")
        (number, header), *rows = self.lines
        kind = header[0].lower()
        if kind not in _OPTIONAL:
            raise ConfigError(
                f"the costs {self.path}, line {number}: the first column is {shown(header[0])}: write the "
                f"header {_header('rank')}, or {_header('layer')}"
            )
        columns = [self._column(number, heading, kind) for heading in header[1:]]
        self._check_columns(number, [column for column in columns if column is not None], kind)
        if not rows:
            self.faults.append(f"there is no line below the header: write one for each {kind}")
        values: dict[str, list[float]] = {column.base: [] for column in columns if column is not None}
        for place, (line, row) in enumerate(rows):
            self._row(line, row, columns, values)
            if kind == "rank" and row[0] != str(place):
                self.faults.append(f"line {line}, column rank: {shown(row[0])} where rank {place} is due")
        if not self.faults:
            self._check_memory(rows, values)
        if self.faults:
            raise ConfigError("\n".join([f"the costs {self.path} cannot be used:", *listed(self.faults)]))
        times = [tuple(values[name]) for name in _TIMES]
        held, kept, last = (tuple(values[name]) if name in values else None for name in _OPTIONAL[kind])
        make = RankTimes if kind == "rank" else LayerTimes
        in_bytes = any(column.has_unit for column in columns if column and column.base in _OPTIONAL[kind])
        return make(times[0], times[1], times[2], held, kept, last, in_bytes=in_bytes)

    def _column(self, line: int, heading: str, kind: str) -> _Column | None:
        word = heading.lower()
        known = (*_TIMES, *_OPTIONAL[kind])
        for base in known:
            units = _TIME_UNITS if base in _TIMES else _SIZE_UNITS
            unit = word.removeprefix(base).removeprefix("_")
            if word == base or (word.startswith(f"{base}_") and unit in units):
                return _Column(heading, base, units[unit], bool(unit))
        nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
        guess = f"; did you mean {nearest[0]!r}?" if nearest else ";"
        self.faults.append(f"line {line}: {shown(heading)} is no column{guess} There are: {', '.join(known)}")
        return None

    def _check_columns(self, line: int, columns: Sequence[_Column], kind: str) -> None:
        bases = [column.base for column in columns]
        self.faults += [
            f"line {line}: two columns say {base}" for base in sorted(set(bases)) if bases.count(base) > 1
        ]
        if not self.faults:
            self.faults += [f"line {line}: there is no column {base}" for base in _TIMES if base not in bases]
        sizes = {column.has_unit for column in columns if column.base in _OPTIONAL[kind]}
        if len(sizes) > 1:
            self.faults.append(f"line {line}: give a unit to all columns of memory, or to none")
        if "activation" not in bases:
            self.faults += [
                f"line {line}: {base} means nothing without a column activation"
                for base in ("weight_activation", "cap")
                if base in bases
            ]

    def _row(
        self, line: int, row: Sequence[str], columns: Sequence[_Column | None], values: dict[str, list[float]]
    ) -> None:
        # A spreadsheet pads rows with empty cells.
        if len(row) < 1 + len(columns) or any(row[1 + len(columns) :]):
            num = max((place for place, cell in enumerate(row, start=1) if cell), default=0)
            self.faults.append(f"line {line}: {num} cells under {1 + len(columns)} headings")
            return
        for cell, column in zip(row[1:], columns, strict=False):
            if column is None:
                continue
            try:
                value = float(cell) * column.scale
            except ValueError:
                value = math.nan
            if not 0 <= value <= _LARGEST:  # also where it is no number (nan)
                self.faults.append(
                    f"line {line}, column {column.heading}: {shown(cell)}: write a finite number of at least "
                    f"0 (and at most {_LARGEST:g})"
                )
            values[column.base].append(value)

    def _check_memory(self, rows: Sequence[tuple[int, list[str]]], values: dict[str, list[float]]) -> None:
        if "weight_activation" in values:
            pairs = zip(rows, values["activation"], values["weight_activation"], strict=True)
            self.faults += [
                f"line {line}, column weight_activation: more is kept ({kept:g}) than is held ({held:g})"
                for (line, _), held, kept in pairs
                if kept > held
            ]


def _header(kind: str) -> str:
    return repr(",".join((kind, *_TIMES)))
