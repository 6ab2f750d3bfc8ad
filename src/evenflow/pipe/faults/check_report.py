"""What `Pipeline.check` found: every number compared, the first node that differs, and a verdict."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("loss", "output", "gradient", "gradient (one stage)", "buffer")


@dataclass(frozen=True, slots=True)
class Compared:
    """One thing that both runs made, such as the gradient of a parameter, over all microbatches.

    `difference` is the largest one, as a share of the largest number of the whole run's tensor: 0 where all
    numbers are the same (NaN and NaN are; 0 and -0 are), `inf` where there is no number to give. Up to
    `allowed` it is no fault. `stage` is the parameter's owner. `note` says what else differs.
    """

    kind: str
    name: str
    stage: int | None
    difference: float
    allowed: float = 0.0
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether the two runs agree here."""
        return self.difference <= self.allowed


@dataclass(frozen=True, slots=True)
class FirstNode:
    """The first node, in program order, that made something else in the split run than in the whole one."""

    node: str
    stage: int
    microbatch: int
    difference: float
    note: str = ""

    def __str__(self) -> str:
        where = f"{self.node} (stage {self.stage}, microbatch {self.microbatch})"
        return f"{where}: {self.note or _share(self.difference)}"


@dataclass(frozen=True, slots=True)
class FirstGradient:
    """The first parameter, in backward order, whose gradient differs; `node` is the last that uses it."""

    parameter: str
    node: str
    stage: int
    difference: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.parameter} of {self.node} (stage {self.stage}): {self.note or _share(self.difference)}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The comparison of one step split with one step whole. `str` of it is a table and the verdict.

    `reference` says what the whole step was. `first_node` and `first_gradient` say where a difference begins;
    `remark` what is to be said where no node can be named.

    >>> row = Compared("gradient", "0.weight", stage=0, difference=0.0)
    >>> report = CheckReport("a plain loop", 2, 4, (row,))
    >>> report.equal
    True
    >>> print(report)
    One step split into 2 stages, against a plain loop: 4 microbatches
      what       stage   compared   equal   largest difference
      gradient   0              1       1   0
    equal: everything, bit for bit
    """

    reference: str
    num_stages: int
    num_microbatches: int
    rows: tuple[Compared, ...]
    first_node: FirstNode | None = None
    first_gradient: FirstGradient | None = None
    remark: str = ""

    @property
    def equal(self) -> bool:
        """Whether everything agrees."""
        return all(row.fits for row in self.rows)

    @property
    def title(self) -> str:
        """What was compared."""
        return (
            f"One step split into {_count(self.num_stages, 'stage')}, against {self.reference}: "
            f"{_count(self.num_microbatches, 'microbatch')}"
        )

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns of `table`."""
        return ("what", "stage", "compared", "equal", "largest difference")

    @property
    def table(self) -> list[tuple[str, ...]]:
        """The rows put together by kind and stage, as cells of text."""
        order = sorted(self.rows, key=lambda row: (KINDS.index(row.kind), _place(row)))
        groups = itertools.groupby(order, key=lambda row: (row.kind, row.stage))
        return [_cells(kind, stage, list(rows)) for (kind, stage), rows in groups]

    @property
    def verdict(self) -> str:
        """A sentence, and where something differs a line for each thing that is known about it."""
        if self.equal:
            near = [row for row in self.rows if row.difference > 0]
            if not near:
                return "equal: everything, bit for bit"
            most = max(row.allowed for row in near)
            kinds = _count(len(near), "gradient")
            return (
                f"equal: bit for bit, but {kinds} of shared parameters to within {most:g} of their largest "
                "number"
            )
        wrong = [row for row in self.rows if not row.fits]
        lines = [f"different: {len(wrong)} of {len(self.rows)}, {_named(wrong)}"]
        if self.first_node is not None:
            lines.append(f"the first node that differs: {self.first_node}")
        if self.first_gradient is not None:
            lines.append(f"the first gradient that differs, in backward order: {self.first_gradient}")
        if self.remark:
            lines.append(self.remark)
        return "\n".join(lines)

    def __str__(self) -> str:
        cells = [self.headings, *self.table]
        widths = [max(len(row[at]) for row in cells) for at in range(len(self.headings))]
        lines = ["  " + "   ".join(_aligned(row, widths)).rstrip() for row in cells]
        return "\n".join([self.title, *lines, self.verdict])


def _place(row: Compared) -> int:
    return -1 if row.stage is None else row.stage


def _cells(kind: str, stage: int | None, rows: Sequence[Compared]) -> tuple[str, ...]:
    worst = max(rows, key=lambda row: row.difference)
    text = "0" if worst.difference == 0 else f"{_number(worst)} ({worst.name})"
    num_same = sum(row.difference == 0 for row in rows)
    return kind, "" if stage is None else str(stage), str(len(rows)), str(num_same), text


def _number(row: Compared) -> str:
    return row.note or f"{row.difference:.1e}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if at in (2, 3) else cell.ljust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _named(rows: Sequence[Compared], most: int = 5) -> str:
    each = [f"{row.kind} {row.name}".rstrip() if row.kind != "loss" else "the loss" for row in rows[:most]]
    return ", ".join(each) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _share(difference: float) -> str:
    return f"by {difference:.1e} of its largest number"


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}" if number == 1 else f"{number} {what}{plural}"
