"""`evenflow doctor`: check and time every link, advise, and write the cluster file."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.cli.printing import print_line
from evenflow.cli.writing import check_new
from evenflow.cluster.write import write_cluster
from evenflow.doctor.advice import advice
from evenflow.doctor.cluster_of import cluster_of
from evenflow.doctor.examine import Examination
from evenflow.doctor.exchange import Exchange
from evenflow.doctor.run import run
from evenflow.doctor.worker import Fault
from evenflow.launcher import rank_environment
from evenflow.view.units import format_bytes, format_seconds


def doctor(device: str | None, num_ranks: int | None, out: Path | None, timeout_seconds: float) -> bool:
    """Examine all links, print what was found, and return whether all of them work.

    Raises `ConfigError` for ranks that cannot be, a file that is there already or cannot be written.
    """
    check_new("--out", out)
    console = Console()
    place = rank_environment()
    with console.status("examining the links"):
        found = run(device, num_ranks, timeout_seconds=timeout_seconds)
    if place is None or place.rank == 0:
        print_examination(console, found)
        if out is not None:
            write_cluster(cluster_of(found), out)
            print_line(console, f"wrote {out}")
    return all(isinstance(link, Exchange) for link in found.links.values())


def print_examination(console: Console, found: Examination) -> None:
    """Print the ranks, a line for each link, and the advice."""
    for rank, place in enumerate(found.places):
        console.print(
            Text(
                f"rank {rank}: {place.device_name} on {place.host}, {format_bytes(place.memory_bytes)}, "
                f"{place.flops_per_second / 1e9:,.0f} GFLOP/s in float32"
            )
        )
    table = Table("ranks", "data", "latency", "there", "back", "both at once", "hidden behind compute")
    for (low, high), link in found.links.items():
        match link:
            case Fault(reason):
                table.add_row(f"{low} – {high}", Text(reason, style="bold red"))
            case Exchange():
                rates = (
                    link.there_bytes_per_second,
                    link.back_bytes_per_second,
                    link.together_bytes_per_second,
                )
                table.add_row(
                    f"{low} – {high}",
                    "right",
                    format_seconds(link.latency_seconds),
                    *(f"{format_bytes(rate)}/s" for rate in rates),
                    f"{link.overlap_share:.0%}",
                )
    console.print(table)
    for piece in advice(found):
        console.print(Text(f"• {piece}"))
