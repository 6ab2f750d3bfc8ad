"""Start one process per rank on this machine, and bring whatever goes wrong back to the caller, once.

The processes are started, watched and ended by torch's own elastic launcher. What is added here:
every failure arrives as one exception that names the rank, how its process ended and its own message,
and the launcher's log and the other ranks' consequential errors stay out of the way.

The same script runs unchanged under `torchrun`: `launch` then finds that its process already is a rank
and calls the function. Only this file reads of a run from the environment (`runtime.ranks.network` looks
whether Gloo's interface is named there, `cost.cache` where measurements are kept).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from evenflow import errors
from evenflow.errors import ConfigError, EvenflowError, PeerError
from evenflow.runtime.ranks import alarm

T = TypeVar("T")

# A rank that fails *because of* a peer waits this long before its process ends, so that the launcher,
# which looks ten times a second and reports the first end that it sees, meets the cause before the
# consequence. It then ends the waiting rank at once; the wait runs out only if the peer still lives.
_PEER_GRACE_SECONDS = 5.0

# How Gloo and the store say that the other side is gone, in plain RuntimeErrors.
_PEER_LOST_PHRASES = ("connection closed by peer", "connection reset by peer", "broken pipe")

_ERRORS_BY_NAME: Mapping[str, type[EvenflowError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, EvenflowError)
}

_QUIETED_LOGGERS = (
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.multiprocessing.spawn",
    "torchelastic-events-null",
)


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """What the launcher told this process about its place in the run."""

    rank: int
    local_rank: int
    num_ranks: int
    num_restarts: int


def rank_environment() -> RankEnvironment | None:
    """This process's place in the run; None where no launcher (`launch`, `torchrun`) started it.

    Example:
        >>> rank_environment() is None
        True
    """
    if not dist.is_torchelastic_launched():
        return None
    return RankEnvironment(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        num_ranks=int(os.environ["WORLD_SIZE"]),
        num_restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def library_settings() -> dict[str, str]:
    """What the environment tells the libraries that carry tensors: its NCCL_… and GLOO_… variables."""
    return {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))}


def launch(fn: Callable[..., T], *args: object, nproc: int, num_threads: int = 1) -> list[T]:
    """Call `fn(*args)` in `nproc` new processes, one per rank, and wait for all of them.

    Under `torchrun` no process is started: `fn` is called in this one, which is a rank already.

    Args:
        fn: A function of a module (it is sent by name; a lambda or a local function cannot be).
        *args: Its arguments, sent by pickle.
        nproc: The number of ranks on this machine.
        num_threads: The threads that each rank's torch uses on the CPU.

    Returns:
        What each rank's call returned, in order of rank; under `torchrun` only this rank's.

    Raises:
        ConfigError: `nproc` is below one, differs from what `torchrun` started, or `fn` cannot be sent.
        PeerError: A rank failed or was killed. The message names the rank, its exit code or signal and
            its own error; the rank's traceback is the exception's note.
        EvenflowError: What a rank raised itself comes back as its own class, under the name of the rank.
        KeyboardInterrupt: Ctrl-C; every rank's process has ended.

    Example:
        >>> import math
        >>> launch(math.sqrt, 9.0, nproc=2)
        [3.0, 3.0]
    """
    if nproc < 1:
        raise ConfigError(f"launch(nproc={nproc}): there must be at least 1 process")
    place = rank_environment()
    if place is not None:
        if place.num_ranks != nproc:
            raise ConfigError(
                f"launch(nproc={nproc}), but the launcher that started this process (torchrun) started "
                f"{place.num_ranks} ranks: give both the same number"
            )
        torch.set_num_threads(num_threads)
        with _process_group_closed():
            return [fn(*args)]
    _check_can_be_sent(fn, args)
    with (
        tempfile.TemporaryDirectory(prefix="evenflow_launch_", ignore_cleanup_errors=True) as folder,
        _elastic_log_quiet(),
        _signal_handlers_restored(),
    ):
        return _run_elastic(fn, args, nproc, num_threads, Path(folder))


def _run_elastic(
    fn: Callable[..., T], args: tuple[object, ...], nproc: int, num_threads: int, folder: Path
) -> list[T]:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"evenflow-{uuid.uuid4().hex[:12]}",
        role="rank",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # port 0: the system picks a free one
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
    )
    try:
        returned = elastic_launch(config, _run_rank)(fn, args, num_threads, folder)
    except ChildFailedError as failed:
        found = _read_alarm(folder, config.run_id)
        raise (_explain(failed, _read_reports(folder)) if found is None else found) from None
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stopped.sigval) from None
    return [pickle.loads(returned[rank]) for rank in range(nproc)]


def _check_can_be_sent(fn: Callable[..., T], args: tuple[object, ...]) -> None:
    try:
        pickle.dumps(fn)
    except Exception as error:
        raise ConfigError(
            f"launch cannot send {_name(fn)} to other processes ({error}): give it a function that stands "
            "at the top of a module, not a lambda or one defined inside another function"
        ) from error
    try:
        pickle.dumps(args)
    except Exception as error:
        raise ConfigError(
            f"launch cannot send the arguments of {_name(fn)} to other processes ({error}): pass plain data, "
            "and build loaders, models and locks inside the function"
        ) from error


def _name(fn: Callable[..., object]) -> str:
    return getattr(fn, "__qualname__", repr(fn))


# --- in the rank's process ---------------------------------------------------------------------------


def _run_rank(fn: Callable[..., object], args: tuple[object, ...], num_threads: int, folder: Path) -> bytes:
    """What each rank's process runs: `fn`, whose pickled result it returns, or a report of its failure."""
    # Ctrl-C reaches every process of the terminal. The launching one answers it and ends the ranks; a
    # rank that is deep in a wait could not, so the signal simply ends it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # OMP_NUM_THREADS would come too late: torch was imported to receive `fn`.
    torch.set_num_threads(num_threads)
    try:
        with _process_group_closed():
            return _pickled_result(fn, fn(*args))
    except Exception as error:
        _write_report(error, folder)
        if _blames_a_peer(error):
            time.sleep(_PEER_GRACE_SECONDS)
        _end_at_once(1)
        raise
    except SystemExit as stopped:
        if isinstance(stopped.code, int) and stopped.code != 0:
            _end_at_once(stopped.code)
        raise


def _end_at_once(exit_code: int) -> None:
    """End a failed rank whose process group is open: taking that apart may crash or wait for ever."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


@contextlib.contextmanager
def _process_group_closed() -> Iterator[None]:
    """Close the process group that was opened inside: a process that ends with one may crash doing so.

    Only after success, because to take a group apart whose other side is gone may wait for ever.
    """
    was_open = dist.is_initialized()
    yield
    if dist.is_initialized() and not was_open:
        dist.destroy_process_group()


def _pickled_result(fn: Callable[..., object], returned: object) -> bytes:
    # Pickled here and not by the launcher's queue, whose failure would reach nobody.
    try:
        return pickle.dumps(returned)
    except Exception as error:
        raise ConfigError(
            f"launch cannot send back what {_name(fn)} returned ({error}): return plain data or tensors"
        ) from error


def _blames_a_peer(error: Exception) -> bool:
    if isinstance(error, PeerError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        phrase in str(error).lower() for phrase in _PEER_LOST_PHRASES
    )


@dataclass(frozen=True, slots=True)
class _Report:
    """A rank's exception as it travels, as JSON, to the launching process."""

    rank: int
    class_name: str
    is_ours: bool
    blames_a_peer: bool
    message: str
    traceback: str
    time_ns: int


def _write_report(error: Exception, folder: Path) -> None:
    place = rank_environment()
    assert place is not None, "a rank's process was started by the launcher"
    report = _Report(
        rank=place.rank,
        class_name=type(error).__name__,
        is_ours=isinstance(error, EvenflowError),
        blames_a_peer=_blames_a_peer(error),
        message=str(error),
        traceback="".join(traceback.format_exception(error)).rstrip(),
        time_ns=time.time_ns(),
    )
    unfinished = folder / f"rank{place.rank}.json.part"
    unfinished.write_text(json.dumps(asdict(report)), encoding="utf-8")
    unfinished.rename(folder / f"rank{place.rank}.json")


# --- in the launching process ------------------------------------------------------------------------


def _read_reports(folder: Path) -> Mapping[int, _Report]:
    """The reports of the ranks that failed with an exception, by rank."""
    reports = (_Report(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank*.json"))
    return {report.rank: report for report in reports}


def _read_alarm(folder: Path, run_id: str) -> PeerError | None:
    """What the ranks' watchdogs have reported, where torch keeps the errors of processes; None if nothing."""
    for path in (folder / "elastic").glob(f"{run_id}_*/*/*/error.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # one that was ended while it wrote
            found = json.loads(path.read_text(encoding="utf-8"))["message"]["message"]
            _, sign, text = found.partition(alarm.SIGN)
            if sign:
                said, _, known = text.partition("\n\n")
                error = PeerError(said)
                error.add_note(known)
                return error
    return None


def _explain(failed: ChildFailedError, reports: Mapping[int, _Report]) -> EvenflowError:
    """The one exception that the user sees: the first cause among what the ranks reported."""
    rank, failure = failed.get_first_failure()
    seen = reports.get(rank)
    causes = sorted(
        (report for report in reports.values() if not report.blames_a_peer), key=lambda report: report.time_ns
    )
    # The launcher saw `rank` end first. Only where that rank itself blames a peer, and another rank
    # reported an error of its own, is the cause elsewhere.
    cause = causes[0] if causes and (seen is None or seen.blames_a_peer) and failure.exitcode >= 0 else seen
    if cause is None:
        error = PeerError(_describe_silent_end(rank, failure.exitcode))
        stood = [f"  {each.message}" for _, each in sorted(reports.items()) if each.blames_a_peer]
        if stood:
            error.add_note("\n".join(["Where the others stood:", *stood]))
        return error
    return _rebuild(cause, failure.exitcode)


def _rebuild(report: _Report, exit_code: int) -> EvenflowError:
    if report.is_ours:
        ours = _ERRORS_BY_NAME.get(report.class_name, EvenflowError)
        return ours(f"rank {report.rank}: {report.message}")
    detail = f"{report.class_name}: {report.message}" if report.message else report.class_name
    error = PeerError(f"rank {report.rank} failed (exit code {exit_code}): {detail}")
    # Where in the user's code: our own errors say it in their message.
    error.add_note(f"On rank {report.rank}:\n{report.traceback}")
    return error


def _describe_silent_end(rank: int, exit_code: int) -> str:
    """What is known of a rank whose process ended without an exception of its own."""
    if exit_code >= 0:
        return (
            f"rank {rank} ended with exit code {exit_code} and no exception: it called exit, or failed "
            "before its function began; if its output above speaks of bootstrapping, put the call to launch "
            'under `if __name__ == "__main__":`'
        )
    number = -exit_code
    name = signal.Signals(number).name if number in {known.value for known in signal.Signals} else "unknown"
    hint = "; the system does this to a process when memory runs out" if number == signal.SIGKILL else ""
    return f"rank {rank} was killed by signal {number} ({name}){hint}; every other rank has been ended"


@contextlib.contextmanager
def _elastic_log_quiet() -> Iterator[None]:
    """Keep the elastic launcher's log off the terminal: what matters in it is in our exception."""
    loggers = [logging.getLogger(name) for name in _QUIETED_LOGGERS]
    before = [logger.propagate for logger in loggers]
    silent = logging.NullHandler()
    for logger in loggers:
        logger.propagate = False
        logger.addHandler(silent)
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(silent)


@contextlib.contextmanager
def _signal_handlers_restored() -> Iterator[None]:
    """The elastic launcher sets handlers for its time and leaves them behind; put the caller's back."""
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread set handlers, so the launcher sets none either
        return
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
