"""Kill ranks of a training run again and again, and see that it ends as if nothing had happened.

    python benchmarks/torture.py [NUM_KILLS]

A run on four ranks saves every third step and restarts from its last checkpoint. A rank drawn at random is
killed (SIGKILL) in turn in an op of a step, while a checkpoint is written, and at a random moment of starting
again, in which it builds, loads or takes its first steps. At the end its losses must be those of an
undisturbed run bit for bit, each checkpoint readable, and no process or shared memory left.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evenflow.checkpoint.load import open_checkpoint, problems
from evenflow.checkpoint.manifest import checkpoints_in
from evenflow.journal.folder import read_steps

MODEL = Path(__file__).with_name("torture_model.py")
NUM_RANKS = 4
PHASES = ("step", "save", "load")
_PATIENCE_SECONDS = 300.0  # for the next sign of life of a run
_CONFIG = """
name = "torture"
[model]
function = "{model}:build"
[training]
steps = {steps}
learning_rate = 1e-2
warmup_steps = 2
validate_every = 1000000
[pipeline]
stages = {num_ranks}
num_microbatches = 4
[checkpoints]
every = 3
"""


@dataclass
class Outcome:
    """What came of a run: its losses, the kills in each phase, and what was wrong."""

    losses: list[float | None] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def run(
    place: Path,
    num_steps: int,
    *,
    num_kills: int = 0,
    seed: int = 0,
    evenflow: Sequence[str] = (sys.executable, "-m", "evenflow"),
) -> Outcome:
    """Train in a new folder, with so many kills on the way."""
    place.mkdir(parents=True)
    config = place / "torture.toml"
    config.write_text(_CONFIG.format(model=MODEL, steps=num_steps, num_ranks=NUM_RANKS))
    command = [*evenflow, "train", str(config), "--resume", str(place / "run")]
    if num_kills:
        command += ["--max-restarts", str(10 * num_kills)]
    environment = os.environ | {"TORTURE_FOLDER": str(place), "OMP_NUM_THREADS": "1"}
    outcome = Outcome()
    before = _left_in_memory()
    log = place / "output.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            generator = random.Random(seed)
            while sum(outcome.kills.values()) < num_kills and process.poll() is None:
                phase = PHASES[sum(outcome.kills.values()) % len(PHASES)]
                if _kill_in(phase, place, process, generator):
                    outcome.kills[phase] += 1
            process.wait(_PATIENCE_SECONDS + num_steps)
        finally:
            _end_session(process)
    if process.returncode != 0:
        outcome.faults.append(f"ended with {process.returncode}: {log.read_text()[-4000:]}")
    outcome.faults += [f"left behind: {each}" for each in _left_behind(place)]
    outcome.faults += [f"left in shared memory: {each}" for each in sorted(_left_in_memory() - before)]
    for folder in (*checkpoints_in(place / "run" / "checkpoints"), place / "run" / "checkpoint"):
        outcome.faults += problems(open_checkpoint(folder))
    outcome.losses = [step.loss for step in read_steps(place / "run")]
    return outcome


def _kill_in(phase: str, place: Path, process: "subprocess.Popen[str]", generator: random.Random) -> bool:
    """Kill a rank in a phase of the attempt that runs now; whether it could be, before the run had ended."""
    for _ in _waiting(process):
        pids = _pids(place)
        if len(pids) == NUM_RANKS:
            break
    else:
        return False
    rank = generator.randrange(NUM_RANKS)
    if phase == "step":
        (place / f"order-{rank}").write_text(str(generator.randrange(200)))
    elif phase == "load":
        time.sleep(generator.uniform(0, 1.5))
    else:
        saving = place / "run" / "checkpoints"
        for _ in _waiting(process):
            if any(saving.glob("*.partial")):
                break
        else:
            return False
        time.sleep(generator.uniform(0, 0.02))
    if phase != "step":
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)
    for _ in _waiting(process):
        if not _lives(pids[rank]):
            break
    else:
        return False
    for path in place.glob("*.pid"):
        if int(path.read_text() or 0) in pids.values():  # the next attempt writes its own
            path.unlink()
    return True


def _pids(place: Path) -> dict[int, int]:
    """The processes of the attempt that runs now, by rank."""
    found = {}
    for rank in range(NUM_RANKS):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found[rank] = int((place / f"{rank}.pid").read_text())
    return {rank: pid for rank, pid in found.items() if _lives(pid)}


def _lives(pid: int) -> bool:
    """Whether a process is there, and no mere name that its parent has not asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _waiting(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Yield again and again, until the process has ended; raises where it takes for ever."""
    end = time.monotonic() + _PATIENCE_SECONDS
    while process.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(f"nothing came for {_PATIENCE_SECONDS:g} s")
        yield
        time.sleep(0.001)


def _end_session(process: "subprocess.Popen[str]") -> None:
    """End what was started, if it is still there: it has a session of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _left_behind(place: Path) -> list[str]:
    """Processes that were started for this run and live on; those that are about to end have a moment."""
    for _ in range(100):
        if not processes_of("TORTURE_FOLDER", str(place)):
            return []
        time.sleep(0.1)
    return list(processes_of("TORTURE_FOLDER", str(place)).values())


def processes_of(variable: str, value: str) -> dict[int, str]:
    """The processes that were started with a variable of the environment so, and their commands."""
    mark, found = f"{variable}={value}".encode(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(process.name)] = command
    return found


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def _left_in_memory() -> set[str]:
    """What has a name in shared memory, and no process that has it mapped: nobody will ever use it.

    Mappings are told by file numbers, as a semaphore is mapped before it gets its name.
    """
    place = Path("/dev/shm")
    if not place.is_dir():
        return set()
    numbers = {each.name: each.inode() for each in os.scandir(place)}  # first: no map read has what is newer
    mapped = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            mapped |= {int(line.split()[4]) for line in (process / "maps").read_text().splitlines()}
    return {name for name, number in numbers.items() if number not in mapped and (place / name).exists()}


def main() -> None:
    """Train undisturbed and disturbed, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_kills", nargs="?", type=int, default=100)
    num_kills: int = parser.parse_args().num_kills
    num_steps = 100 + 20 * num_kills
    with tempfile.TemporaryDirectory(prefix="evenflow_torture_") as place:
        start = time.monotonic()
        alone = run(Path(place) / "undisturbed", num_steps)
        middle = time.monotonic()
        killed = run(Path(place) / "killed", num_steps, num_kills=num_kills)
        seconds = time.monotonic() - middle
    same = alone.losses == killed.losses
    kills = ", ".join(f"{number} in a {phase}" for phase, number in killed.kills.items())
    print(f"undisturbed: {num_steps} steps in {middle - start:.0f} s")
    print(f"killed {sum(killed.kills.values())} times ({kills}): {seconds:.0f} s")
    print(f"losses of {len(killed.losses)} steps {'are the same bit for bit' if same else 'DIFFER'}")
    for fault in (*alone.faults, *killed.faults):
        print(f"FAULT: {fault}")
    if not same or alone.faults or killed.faults or sum(killed.kills.values()) < num_kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
