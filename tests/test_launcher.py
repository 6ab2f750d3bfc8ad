"""Processes: results come back, every kind of end is named once, and nothing is left running."""

import logging
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from evenflow import errors
from evenflow.errors import ConfigError, EvenflowError, PeerError, RecordError
from evenflow.launcher import (
    RankEnvironment,
    _describe_silent_end,
    _explain,
    _rebuild,
    _Report,
    launch,
    rank_environment,
)
from forked import ranks_begin_by
from preloaded import python

# --- what the ranks run --------------------------------------------------------------------------------


def sum_over_ranks(*, num_rounds, before_round):
    """All-reduce `num_rounds` times; rank 1 calls `before_round` before the third."""
    dist.init_process_group("gloo")
    total = torch.zeros(1)
    for number in range(num_rounds):
        if number == 2 and dist.get_rank() == 1:
            before_round()
        total += 1
        dist.all_reduce(total)
    return total.item()


def place_and_sum(word):
    total = sum_over_ranks(num_rounds=3, before_round=lambda: None)
    return rank_environment(), word, torch.get_num_threads(), total


def note_pid(folder):
    (folder / str(os.environ["RANK"])).write_text(str(os.getpid()))


def killed_in_the_middle(folder, number):
    note_pid(folder)
    return sum_over_ranks(num_rounds=5, before_round=lambda: os.kill(os.getpid(), number))


def raising_in_the_middle(folder):
    note_pid(folder)

    def fail():
        raise ValueError("the seventh layer is missing")

    return sum_over_ranks(num_rounds=5, before_round=fail)


def exiting_in_the_middle(folder):
    note_pid(folder)
    return sum_over_ranks(num_rounds=5, before_round=lambda: sys.exit(3))


def refusing():
    raise RecordError("the model reads a file while it runs")


def blaming_a_peer(folder):
    """Rank 0 complains of rank 1, which a second later fails for a reason of its own."""
    dist.init_process_group("gloo")
    note_pid(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        raise PeerError("rank 1 did not answer")
    has_ended(int((folder / "0").read_text()), within_seconds=1.0)
    raise ZeroDivisionError("the reason")


def unpicklable_result():
    return lambda: None


# --- the launching side ----------------------------------------------------------------------------------


def has_ended(pid, within_seconds=10.0):
    """Wait for the process to end, woken by its end and not by a clock."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_seconds)[0])
    finally:
        os.close(descriptor)


def assert_all_ended(folder, num_ranks=2):
    pids = [int(path.read_text()) for path in folder.iterdir()]
    assert len(pids) == num_ranks
    assert all(has_ended(pid) for pid in pids)


def test_ranks_talk_and_their_results_come_back_in_order():
    with ranks_begin_by("spawn"):
        found = launch(place_and_sum, "hello", nproc=2)
    assert found == [
        (RankEnvironment(rank=rank, local_rank=rank, num_ranks=2, num_restarts=0), "hello", 1, 14.0)
        for rank in range(2)
    ]


def test_num_threads_is_each_ranks_and_the_callers_signal_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert launch(place_and_sum, "", nproc=1, num_threads=2)[0][2] == 2
    assert before == {number: signal.getsignal(number) for number in before}


def test_this_process_is_no_rank():
    assert rank_environment() is None


def test_a_killed_rank_is_named_within_the_time_and_nobody_is_left(tmp_path):
    started = time.monotonic()
    with pytest.raises(PeerError, match=r"^rank 1 was killed by signal 9 \(SIGKILL\); .*memory runs out"):
        launch(killed_in_the_middle, tmp_path, signal.SIGKILL, nproc=2)
    assert time.monotonic() - started < 30
    assert_all_ended(tmp_path)


def test_a_crashed_rank_is_named_with_its_signal():
    assert _describe_silent_end(1, -signal.SIGABRT).startswith(
        "rank 1 was killed by signal 6 (SIGABRT); every"
    )
    assert _describe_silent_end(1, -signal.SIGRTMAX).startswith("rank 1 was killed by signal 64")


def test_a_failed_rank_is_named_with_its_own_message_and_traceback_alone(tmp_path, capfd, caplog):
    before = logging.getLogger("torch.distributed.elastic").propagate
    with pytest.raises(PeerError) as caught, ranks_begin_by("spawn"):  # where what ranks print is seen
        launch(raising_in_the_middle, tmp_path, nproc=2)
    assert str(caught.value) == "rank 1 failed (exit code 1): ValueError: the seventh layer is missing"
    (note,) = caught.value.__notes__
    assert "On rank 1:" in note
    assert "in raising_in_the_middle" in note
    assert_all_ended(tmp_path)
    assert caplog.text == "", "the launcher's log stays out of the way"
    assert capfd.readouterr().err == ""
    assert logging.getLogger("torch.distributed.elastic").propagate == before


def test_a_rank_that_exits_is_named_with_its_code(tmp_path):
    with pytest.raises(PeerError, match=r"^rank 1 ended with exit code 3 and no exception"):
        launch(exiting_in_the_middle, tmp_path, nproc=2)
    assert_all_ended(tmp_path)


def test_our_own_errors_come_back_as_they_were():
    with pytest.raises(RecordError, match=r"^rank 0: the model reads a file while it runs$") as caught:
        launch(refusing, nproc=1)
    assert not hasattr(caught.value, "__notes__")


def test_of_a_killed_rank_the_others_say_where_they_stood():
    failed = ChildFailedError("run", {1: ProcessFailure(1, 4711, -signal.SIGKILL, "")})
    lost = _Report(0, "PeerError", True, True, "rank 0 lost rank 1 in 0B2, step 1", "", 0)
    found = _explain(failed, {0: lost})
    assert str(found).startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert found.__notes__ == ["Where the others stood:\n  rank 0 lost rank 1 in 0B2, step 1"]


def rebuilt(class_name, message, *, is_ours):
    return _rebuild(_Report(0, class_name, is_ours, False, message, "", 0), 1)


def test_an_unknown_class_of_ours_comes_back_as_the_base():
    found = rebuilt("Special", "of a class that launch does not know", is_ours=True)
    assert type(found) is EvenflowError
    assert str(found) == "rank 0: of a class that launch does not know"


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_each_class_of_ours_comes_back_as_it_was(name):
    assert type(rebuilt(name, "why", is_ours=True)) is getattr(errors, name)


def test_an_exception_without_a_message_is_named_by_its_class():
    assert str(rebuilt("KeyError", "", is_ours=False)) == "rank 0 failed (exit code 1): KeyError"


def test_the_cause_is_reported_and_not_who_suffered_from_it(tmp_path):
    with pytest.raises(PeerError) as caught:
        launch(blaming_a_peer, tmp_path, nproc=2)
    assert_all_ended(tmp_path)
    assert str(caught.value) == "rank 1 failed (exit code 1): ZeroDivisionError: the reason"


@pytest.mark.parametrize("nproc", [0, -1])
def test_no_processes_are_refused(nproc):
    with pytest.raises(ConfigError, match=rf"nproc={nproc}\): there must be at least 1 process"):
        launch(place_and_sum, "", nproc=nproc)


def test_a_function_that_cannot_be_sent_is_refused():
    with pytest.raises(ConfigError, match=r"cannot send .*<lambda> .*top of a module"):
        launch(lambda: None, nproc=1)


def test_arguments_that_cannot_be_sent_are_refused():
    with pytest.raises(ConfigError, match=r"cannot send the arguments of place_and_sum .*inside the func"):
        launch(place_and_sum, (number for number in range(3)), nproc=1)


def test_a_result_that_cannot_be_sent_is_the_ranks_error():
    with pytest.raises(
        ConfigError, match=r"^rank 0: launch cannot send back what unpicklable_result returned"
    ):
        launch(unpicklable_result, nproc=1)


# --- under torchrun, and from a script -------------------------------------------------------------------

SCRIPT = """
    import os, sys
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from evenflow.launcher import launch, rank_environment
    from forked import ranks_begin_by

    def work(folder):
        place = rank_environment()
        (folder / f"{place.rank}.part").write_text(str(os.getpid()))
        (folder / f"{place.rank}.part").rename(folder / str(place.rank))
        if "wait" in sys.argv:  # inside torch, where no signal handler of Python's runs
            dist.init_process_group("gloo")
            dist.recv(torch.zeros(1), src=1 - place.rank)
        return place.rank

    if __name__ == "__main__":
        with ranks_begin_by("fork" if "fork" in sys.argv else "spawn"):
            print("returned", launch(work, Path(sys.argv[1]), nproc=2))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@pytest.fixture
def pid_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pids"
    folder.mkdir()
    return folder


def test_a_script_runs_by_itself(script, pid_folder):
    done = subprocess.run(
        [sys.executable, script, pid_folder], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "returned [0, 1]\n"


def test_the_same_script_runs_under_torchrun(script, pid_folder):
    done = subprocess.run(
        [
            *python(),
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
            pid_folder,
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert sorted(done.stdout.splitlines()) == ["returned [0]", "returned [1]"]


def test_torchrun_with_another_number_is_refused(monkeypatch):
    for name, value in {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"launch\(nproc=2\), but .* \(torchrun\) started 4 ranks"):
        launch(place_and_sum, "", nproc=2)


@pytest.mark.parametrize(
    ("number", "exit_code", "start_method"),
    [
        (signal.SIGINT, -signal.SIGINT, "fork"),
        (signal.SIGTERM, 143, "spawn"),
        (signal.SIGKILL, -9, "spawn"),
    ],
)
def test_a_stopped_script_leaves_nobody_behind(script, pid_folder, number, exit_code, start_method):
    with subprocess.Popen(
        [sys.executable, script, pid_folder, "wait", start_method], stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_files(pid_folder, 2)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert_all_ended(pid_folder)


def wait_for_files(folder, count, within_seconds=60.0):
    deadline = time.monotonic() + within_seconds
    while len([path for path in folder.iterdir() if not path.suffix]) < count:
        assert time.monotonic() < deadline, f"{folder} holds {sorted(folder.iterdir())}"
        select.select([], [], [], 0.02)
