"""How long `import evenflow` and the help of each command take: medians of rounds in which each has its turn.

    make bench-start

CPU seconds are those of the process itself: on a shared machine they are steadier than those of the clock.
The goals are 0.15 s for the import and 0.3 s for each help.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import typer

from evenflow.cli.main import app


def commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of each command, those of groups included."""
    for name, command in group.commands.items():
        yield (*before, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Seconds of the clock and of the CPU that one Python takes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    measured = {"python alone": ["-c", "pass"], "import evenflow": ["-c", "import evenflow"]}
    for words in ((), *commands(typer.main.get_command(app))):
        name = " ".join(("evenflow", *words, "--help"))
        measured[name] = ["-m", "evenflow", *words, "--help"]
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, arguments in measured.items():
            took[name].append(seconds(arguments))
    width = max(map(len, measured))
    print(f"{'':{width}}  median ms   CPU ms  (of {rounds})")
    for name, each in took.items():
        clock, cpu = (1e3 * statistics.median(column) for column in zip(*each, strict=True))
        print(f"{name:{width}}  {clock:9.0f}  {cpu:7.0f}")


if __name__ == "__main__":
    main()
