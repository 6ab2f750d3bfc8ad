"""`evenflow profile`: measure what each part of a model costs, and show it as a table."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.cli.feed import make_feed
from evenflow.cli.job import Flags, make_job
from evenflow.cli.printing import print_line
from evenflow.cli.source import build, refusing
from evenflow.cli.writing import check_new
from evenflow.cost.cache import user_folder
from evenflow.cost.profile import Profile, profile_of
from evenflow.cost.recorded import Recorded
from evenflow.cost_table import LayerTimes, write_layers
from evenflow.pipe.building.recorded import recorded
from evenflow.pipe.given.places import device_kind
from evenflow.pipe.given.splitter import Splitter
from evenflow.plan.chain import Chain, Held
from evenflow.view.units import format_count


def profile(flags: Flags, *, csv: Path | None) -> None:
    """Record the model that `evenflow train` would cut, measure its nodes, print them, write the CSV.

    Raises:
        EvenflowError: The model or the data cannot work as given, or the model's code fails.
    """
    check_new("--csv", csv)
    torch.set_num_threads(1)  # as each rank has
    console = Console()
    with console.status("recording the model") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"measuring {name} ({done + 1} of {total})")

        with refusing("the model cannot be measured"):
            found = _recorded(flags)
            measured = profile_of(found, cache=user_folder(), progress=tell)
    _print(console, measured, found)
    if csv is not None:
        write_layers(csv, *_layers(measured.chain))
        print_line(console, f"wrote {csv}")


def _recorded(flags: Flags) -> Recorded:
    kind = device_kind(flags.device)
    job = make_job(dataclasses.replace(flags, device="cpu"))  # as many stages as wanted on one device
    config = job.config
    source = build(config.model, seed=config.training.seed)
    feed = make_feed(config.data, source, config.training)
    sizes = config.pipeline
    return recorded(
        source.model,
        loss=source.loss,
        example=feed.validation[0],
        splitter=Splitter(job.num_ranks, sizes.num_microbatches, sizes.microbatch_size, None),
        max_leaf_share=1 / (4 * job.num_stages),
        device=torch.device(kind, 0) if kind == "cuda" else torch.device(kind),
        seed=config.training.seed,
    )


# -- the table

_MIB = 2.0**20


@dataclass(frozen=True, slots=True)
class _Row:
    """A node as the table shows it: seconds and bytes; `boundary_bytes` is None where no cut may stand."""

    kind: int
    forward: float
    input_grad: float
    weight_grad: float
    saved_bytes: float
    transient_bytes: float
    boundary_bytes: float | None
    num_parameters: int


def _print(console: Console, measured: Profile, found: Recorded) -> None:
    chain = measured.chain
    ((device, seconds),) = chain.seconds.items()
    rows_told = format_count(chain.num_rows, "row")
    title = f"One microbatch of {rows_told} on {device}, {torch.get_num_threads()} thread(s)"
    print_line(console, title, "bold")
    table = Table(show_footer=True, padding=0)
    rows = _rows(measured)
    peak = max(row.transient_bytes for row in rows)
    columns = (
        ("forward\nms", _ms(sum(seconds.forward))),
        ("input\ngrad", _ms(sum(seconds.input_grad))),
        ("weight\ngrad", _ms(sum(seconds.weight_grad))),
        ("saved\nMiB", _mib(sum(held.num_bytes for held in chain.saved))),
        ("passing\nMiB", _mib(peak)),
        ("cut\nMiB", ""),
        ("parameters", f"{sum(parameter.num_elements for parameter in chain.parameters):,}"),
    )
    table.add_column("node", f"all {chain.num_nodes}, most of passing", overflow="fold")
    table.add_column("×", justify="right")
    for heading, footer in columns:
        table.add_column(heading, footer, justify="right", no_wrap=True)
    for start, count in _folded(rows):
        row = rows[start]
        table.add_row(
            Text(chain.names[start]),
            str(count),
            _ms(row.forward),
            _ms(row.input_grad),
            _ms(row.weight_grad),
            _mib(row.saved_bytes),
            _mib(row.transient_bytes),
            "-" if row.boundary_bytes is None else _mib(row.boundary_bytes),
            f"{row.num_parameters:,}",
        )
    console.print(table)
    told = f"{measured.num_measured} distinct nodes measured now" if measured.num_measured else "all cached"
    print_line(console, f"{len(found.graph.nodes)} nodes, {told}")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / _MIB:.3f}"


def _rows(measured: Profile) -> list[_Row]:
    """A row for each node; memory and parameters of several nodes stand with the first of them."""
    chain = measured.chain
    (seconds,) = chain.seconds.values()
    saved = _with_first(chain, chain.saved)
    sizes = [0] * chain.num_nodes
    for parameter in chain.parameters:
        sizes[parameter.nodes[0]] += parameter.num_elements
    return [
        _Row(
            kind=kind,
            forward=seconds.forward[at],
            input_grad=seconds.input_grad[at],
            weight_grad=seconds.weight_grad[at],
            saved_bytes=saved[at],
            transient_bytes=max(chain.forward_transient_bytes[at], chain.backward_transient_bytes[at]),
            boundary_bytes=chain.cut_bytes[at] if at and chain.legal[at] else None,
            num_parameters=sizes[at],
        )
        for at, kind in enumerate(measured.alike)
    ]


def _with_first(chain: Chain, held: Sequence[Held]) -> list[float]:
    """Bytes by node, those of several with the first of them."""
    found = [0.0] * chain.num_nodes
    for one in held:
        found[one.nodes[0]] += one.num_bytes
    return found


def _folded(rows: Sequence[object]) -> list[tuple[int, int]]:
    """Which rows to show, each with how often it comes: parts that repeat in a row are shown once.

    >>> _folded("abcbcbcd")
    [(0, 1), (1, 3), (2, 3), (7, 1)]
    """
    shown: list[tuple[int, int]] = []
    start = 0
    while start < len(rows):
        best, times = 1, 1  # the length of the part, and how often it comes
        for length in range(1, (len(rows) - start) // 2 + 1):
            count = 1
            while rows[start : start + length] == rows[start + count * length :][:length]:
                count += 1
            if count > 1 and length * count > best * times:
                best, times = length, count
        shown += [(start + at, times) for at in range(best)]
        start += best * times
    return shown


# -- the file


def _layers(chain: Chain) -> tuple[list[str], LayerTimes]:
    """Names and times of the parts between which a cut may stand."""
    (seconds,) = chain.seconds.values()
    edges = [0, *(at for at in range(1, chain.num_nodes) if chain.legal[at]), chain.num_nodes]
    saved, kept = (_with_first(chain, held) for held in (chain.saved, chain.kept))
    kept = [min(pair) for pair in zip(saved, kept, strict=True)]  # of one memory the first may differ
    return [chain.names[start] for start in edges[:-1]], LayerTimes(
        _summed(seconds.forward, edges),
        _summed(seconds.input_grad, edges),
        _summed(seconds.weight_grad, edges),
        activation=_summed(saved, edges),
        weight_activation=_summed(kept, edges),
        output=tuple((*chain.cut_bytes, 0.0)[end] for end in edges[1:]),
        in_bytes=True,
    )


def _summed(numbers: Sequence[float], edges: Sequence[int]) -> tuple[float, ...]:
    return tuple(sum(numbers[start:end]) for start, end in pairwise(edges))
