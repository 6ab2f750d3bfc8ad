"""The watchdog: whoever stops, hangs or vanishes is named with its op, and all end in time."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

import evenflow
from evenflow.errors import ConfigError, PeerError
from evenflow.pipe.saving import saver
from evenflow.runtime.notes import stacks
from evenflow.runtime.notes.whereabouts import Wait, Whereabouts
from evenflow.runtime.ranks import watchdog
from evenflow.runtime.ranks.alarm import Answer, report
from evenflow.runtime.ranks.beats import Beat, Blame, blame, heard
from evenflow.runtime.ranks.watchdog import _Watchdog, check_timeout
from evenflow.runtime.stages.stage import Stage
from forked import run_ranks
from unsplit import mean_square, mlp, regression, sgd

TIMEOUT = 1.5
REPORT_SECONDS = 20  # a machine that does nothing else takes 5 at most; tests that run beside these, more
NUM_RANKS = 4
LAST_STEP = 2  # in which something happens


# -- what the ranks do


def make(**options):
    options = {
        "loss": mean_square,
        "example": regression(),
        "num_microbatches": 4,
        "optimizer": sgd,
        "schedule": "1f1b",
        "timeout": TIMEOUT,
    } | options
    return evenflow.pipeline(mlp(4, 8, 8, 8, 8, 1), **options)


def stop(folder: Path) -> None:
    """What Ctrl-Z does to a process; when is noted."""
    (folder / "stopped").write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(folder: Path) -> None:
    (folder / "stopped").write_text(str(time.monotonic()))
    threading.Event().wait()


def steps(pipe, number=LAST_STEP):
    for _ in range(number):
        pipe.step(regression())


def within(op: str, act):
    """Let something happen in an op of this process."""
    stage, kind, at = re.fullmatch(r"(\d+)([FB])(\d+)", op).groups()
    name = {"F": "run_forward", "B": "run_backward"}[kind]
    whole, seen = getattr(Stage, name), []

    def acting(each, flight, *args, **options):
        if each.index == int(stage):
            seen.append(flight)
            if len(seen) == int(at) + 1:  # microbatches come in order
                act()
        return whole(each, flight, *args, **options)

    setattr(Stage, name, acting)


def in_an_op(rank, folder, act, op, link):
    pipe = make(link=link)
    steps(pipe)
    if rank == int(op[0]):
        within(op, lambda: act(folder))
    steps(pipe, 2)  # without the last backwards of a rank others may end a step


def before_agreeing(rank, folder, act, victim):
    pipe = make()
    steps(pipe)
    if rank == victim:
        act(folder)
    pipe.step(regression())


def in_the_update(rank, folder, act, victim):
    pipe = make()
    steps(pipe)
    if rank == victim:
        (optimizer,) = pipe.optimizers.values()
        optimizer.register_step_pre_hook(lambda *_: act(folder))
    pipe.step(regression())
    pipe.step(regression())


def in_an_evaluation(rank, folder, act, op):
    pipe = make()
    steps(pipe)
    if rank == int(op[0]):
        within(op, lambda: act(folder))
    float(pipe.evaluate(regression()).loss)


def while_building(rank, folder, act, victim):
    def optimizer(parameters):
        if rank == victim:
            act(folder)
        return sgd(parameters)

    steps(make(optimizer=optimizer))


def parted(rank, folder):
    """Stages are parted over data ranks, which gather and reduce by torch's own calls."""
    pipe = make(mesh={"dp": 2, "pp": 2}, shard="fsdp", stages=2)
    steps(pipe)
    if rank == 1:
        within("0F0", lambda: stop(folder))
        within("1F0", lambda: stop(folder))
    steps(pipe, 2)


def suspended(rank, folder):
    """All are stopped for longer than the timeout, as by Ctrl-Z, while they wait for one; then they go on."""
    pipe = make(timeout=1.0)
    steps(pipe)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    pipe.share(None)
    if rank == 0:
        pids = [(folder / f"pid{each}").read_text() for each in range(NUM_RANKS)]
        waker = subprocess.Popen(["sh", "-c", "sleep .6; kill -STOP $@; sleep 3; kill -CONT $@", "sh", *pids])
        waker.wait()
    steps(pipe, 3)
    (folder / f"done{rank}").touch()


def loading(rank, folder):
    """What rank 0 reads hangs."""

    def loader():
        yield regression()
        hang(folder)

    pipe = make()
    for batch in pipe.feed(loader()):
        pipe.step(batch)


def slow_but_well(rank, folder):
    """Each op takes a good part of the timeout, and one waits for many of them."""
    pipe = make(num_microbatches=2)
    pipe.step(regression())
    whole = Stage.run_forward

    def slow(*args, **options):
        threading.Event().wait(0.5)
        return whole(*args, **options)

    Stage.run_forward = slow
    pipe.step(regression())
    (folder / f"done{rank}").touch()


def warming(rank, folder):
    """The first step takes longer than the timeout, as compiling does, and so does a checkpoint."""
    save = saver.write_checkpoint

    def slow_save(*args, **options):
        if rank == 0:
            threading.Event().wait(2.5)
        save(*args, **options)

    saver.write_checkpoint = slow_save
    whole = Stage.run_forward

    def slow(*args, **options):
        if rank == 1:
            threading.Event().wait(2.5)
        Stage.run_forward = whole
        return whole(*args, **options)

    Stage.run_forward = slow
    pipe = make(timeout=1.0, num_microbatches=2, stages=2)
    steps(pipe)
    pipe.save(folder / "checkpoint")
    (folder / f"done{rank}").touch()


def closing(rank, folder):
    """Threads and open files of several pipelines, of which none is left."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        pipe = make()
        steps(pipe)
        pipe.close()
    named = [thread for thread in threading.enumerate() if "watchdog" in thread.name]
    for thread in named:
        thread.join(5)
    assert not any(thread.is_alive() for thread in named)
    del pipe
    (folder / f"done{rank}").write_text(str(len(list(Path("/proc/self/fd").iterdir())) - before))


# -- what becomes of it


def assert_reported(folder, ended, victim, *, at, silent=True):
    """All end in time; one prints the report, all have it, and it names the rank and where it stood."""
    stopped = float((folder / "stopped").read_text())
    seconds = [rank.seconds - stopped for rank in ended]
    assert all(0 < took < TIMEOUT + REPORT_SECONDS for took in seconds), seconds
    survivors = [rank for number, rank in enumerate(ended) if number != victim or not silent]
    assert [rank.exit_code for rank in survivors] == [1] * len(survivors)
    if silent:
        assert ended[victim].exit_code == -signal.SIGKILL
    errors = {rank.error for rank in survivors}
    assert len(errors) == 1
    (error,) = errors
    assert [rank.printed.count("evenflow's watchdog: ") for rank in ended].count(1) == 1
    said, _, known = error.removeprefix("PeerError: evenflow's watchdog: ").partition("\n\n")
    culprit = said.split("; ")[1]
    assert culprit.startswith(f"rank {victim} (")
    assert ("is stopped (SIGSTOP, or Ctrl-Z)" in culprit) == silent
    assert at in culprit
    for number in range(len(ended)):
        assert re.search(rf"^rank {number} \(", known, re.MULTILINE)
    assert known.count("thread MainThread:") == len(survivors)
    return said, known


def run(function, folder, *args, num_ranks=NUM_RANKS):
    return run_ranks(function, folder, *args, num_ranks=num_ranks, within_seconds=40)


@pytest.mark.parametrize(
    ("op", "waiting", "edge"),
    [
        ("0F2", "1F2", "the activation 0>1 of microbatch 2"),
        ("3B3", "2B3", "the gradient 3>2 of microbatch 3"),
    ],
)
def test_a_stopped_rank_is_named_with_the_op_that_it_stood_in(tmp_path, op, waiting, edge):
    ended = run(in_an_op, tmp_path, stop, op, "shared-memory")
    said, _ = assert_reported(tmp_path, ended, int(op[0]), at=f", in {op} of step {LAST_STEP}")
    assert f"in {waiting} of step {LAST_STEP} for rank {op[0]}: {edge}; " in said


def test_a_rank_that_stops_on_the_torch_link_is_named(tmp_path):
    ended = run(in_an_op, tmp_path, stop, "2B1", "torch")
    said, _ = assert_reported(tmp_path, ended, 2, at=f", in 2B1 of step {LAST_STEP}")
    # What Gloo has not sent yet when its process stops does not come, either.
    assert re.search(rf"\(timeout: 1.5 s\) in \d[FB]\d of step {LAST_STEP} for rank 2: the ", said)


def test_a_rank_that_stops_between_steps_is_named(tmp_path):
    ended = run(before_agreeing, tmp_path, stop, 0)
    said, _ = assert_reported(tmp_path, ended, 0, at=f"outside of a step (the last was step {LAST_STEP - 1})")
    assert "comparing batches with all ranks" in said


def test_a_rank_that_stops_in_the_update_is_named(tmp_path):
    ended = run(in_the_update, tmp_path, stop, 2)
    assert_reported(tmp_path, ended, 2, at=f"the optimizer's update (step {LAST_STEP})")


def test_a_rank_that_stops_in_an_evaluation_is_named(tmp_path):
    ended = run(in_an_evaluation, tmp_path, stop, "1F3")
    assert_reported(tmp_path, ended, 1, at=", in 1F3 of step")


def test_a_rank_that_stops_while_the_pipeline_is_built_is_named(tmp_path):
    ended = run(while_building, tmp_path, stop, 0)
    assert_reported(tmp_path, ended, 0, at="building the pipeline")


def test_a_rank_that_stops_where_others_gather_parameters_is_named(tmp_path):
    ended = run(parted, tmp_path)
    assert_reported(tmp_path, ended, 1, at="F0 of step 2")


def test_a_rank_that_hangs_in_an_op_is_named_with_its_line(tmp_path):
    ended = run(in_an_op, tmp_path, hang, "1F2", "auto")
    said, known = assert_reported(
        tmp_path, ended, 1, at="has stood in 1F2 of step 2, at test_watchdog.py:", silent=False
    )
    assert re.search(r"in hang, for \d+\.\d s", said)
    assert "evenflow.pipeline(timeout=SECONDS)" in said
    assert "in hang: threading.Event().wait()" in known


def test_a_loader_that_hangs_is_named_with_its_line(tmp_path):
    ended = run(loading, tmp_path)
    said, _ = assert_reported(tmp_path, ended, 0, at="in hang, for ", silent=False)
    assert "waiting for what rank 0 shares" in said


@pytest.mark.parametrize(("function", "num_ranks"), [(slow_but_well, 4), (warming, 2), (suspended, 4)])
def test_who_gets_on_or_warms_up_is_left_alone(tmp_path, function, num_ranks):
    ended = run(function, tmp_path, num_ranks=num_ranks)
    assert [(rank.exit_code, rank.printed) for rank in ended] == [(0, "")] * num_ranks


def test_a_closed_pipeline_leaves_no_thread_and_no_open_file(tmp_path):
    ended = run(closing, tmp_path, num_ranks=2)
    assert [(rank.exit_code, rank.printed) for rank in ended] == [(0, "")] * 2


# -- under launch, with everything that is real


def launched(folder):
    with (folder / f"stderr{os.environ['RANK']}").open("w") as printed:
        os.dup2(printed.fileno(), 2)
    in_an_op(int(os.environ["RANK"]), folder, stop, "0F1", "auto")


def test_launch_raises_the_report(tmp_path):
    with pytest.raises(
        PeerError, match=r"^rank 1 .* in 1F1 of step 2 for rank 0: .* stopped .*, in 0F1 of"
    ) as caught:
        evenflow.launch(launched, tmp_path, nproc=2)
    assert time.monotonic() - float((tmp_path / "stopped").read_text()) < TIMEOUT + REPORT_SECONDS
    (note,) = caught.value.__notes__
    assert note.startswith("rank 0 (")
    printed = "".join(path.read_text() for path in tmp_path.glob("stderr*"))
    assert printed.count("evenflow's watchdog: ") == 1


# -- one watchdog, with a store in this process


def watching(timeout=10.0, size=2):
    """A watchdog of rank 0, which waits for rank 1, and time that it is told."""
    where = Whereabouts(0)
    where.end()
    where.stepped(1, [])
    where.waiting = Wait((1,), "something")
    return _Watchdog(where, size, HashStore(), "watch", timeout)


class Raised(Exception):
    pass


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    told = Clock()
    monkeypatch.setattr(watchdog, "time", told)
    return told


def looks(dog, clock, number, seconds=0.5):
    """So many looks, one after the other; how many until an alarm."""

    def raised(found):
        raise Raised(found)

    dog._raise = raised
    for at in range(number):
        clock.now += seconds
        try:
            dog._look()
        except Raised:
            return at
    return None


def test_a_verdict_counts_when_it_is_seen_twice(clock):
    dog = watching()
    assert looks(dog, clock, 20) is None
    assert dog._found is None
    assert looks(dog, clock, 1) is None
    assert dog._found == Blame(0, (1,), silent=True)
    assert looks(dog, clock, 1) == 0


def test_a_process_that_did_not_run_measures_nothing(clock):
    dog = watching()
    assert looks(dog, clock, 15) is None
    assert looks(dog, clock, 1, seconds=100.0) is None
    assert looks(dog, clock, 19) is None
    assert looks(dog, clock, 10) is not None


def test_who_has_closed_its_pipeline_is_never_ended(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog.Process, "end_sibling", lambda process: ended.append(process.pid))
    dog = watching(size=4)
    beats = {
        1: beat(1, pid=11, machine=dog._machine, has_left=True),
        2: beat(2, pid=12, machine=dog._machine),
        3: beat(3, pid=13, machine="another"),
    }
    dog._end_siblings([1, 2, 3], beats)
    assert ended == [12]
    assert list(dog._sights([1, 2, 3], beats)) == [2]


def test_an_error_of_one_look_is_not_the_end(monkeypatch):
    dog, seen = watching(timeout=0.02), []

    def look():
        seen.append(len(seen))
        if len(seen) == 6:
            dog._where.ended.set()
        if len(seen) in (1, 2, 4, 5):
            raise RuntimeError("the store does not answer")

    monkeypatch.setattr(dog, "_look", look)
    monkeypatch.setattr(dog, "_look_alone", seen.append)
    dog.run()
    assert seen == [0, 1, 2, 3, 4, 5]
    assert heard(dog._store.get("watch/beat/0")).has_left


def test_with_many_ranks_each_asks_more_seldom():
    assert watching(timeout=300.0, size=8)._asking_seconds == 1.0
    assert watching(timeout=300.0, size=512)._asking_seconds == 8.0
    assert watching(timeout=300.0, size=4096)._asking_seconds == 15.0


def test_the_report_quotes_the_beats_on_which_the_alarm_was_raised():
    beats = {0: beat(0, [1], stood=10.4), 1: beat(1, stood=10.2)}
    answers = {0: Answer(beat(0, [1], stood=0.1), ""), 1: Answer(beat(1, stood=0.2), "")}
    said = report(Blame(0, (1,), silent=False), beats, answers, timeout_seconds=10.0)
    assert "waited 10.4 s" in said
    assert "for 10.2 s, and waits for no rank" in said


@pytest.mark.parametrize(
    ("waits", "said"),
    [
        (("a checkpoint", "a checkpoint"), "all wait for the same: what they do together does not end"),
        (("a batch", "a checkpoint"), "each rank waits for another one: they do not do the same things"),
    ],
)
def test_a_ring_says_whether_all_do_the_same(waits, said):
    beats = {rank: beat(rank, [1 - rank], waits_on=what) for rank, what in enumerate(waits)}
    assert said in report(Blame(0, (), silent=False), beats, {}, timeout_seconds=10.0)


def test_stacks_do_not_wait_for_sources(monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(stacks, "_READ_SECONDS", 0.01)
    monkeypatch.setattr(stacks.linecache, "getlines", lambda file: hangs.wait())
    monkeypatch.setattr(stacks.linecache, "cache", {})
    waits = threading.Thread(target=hangs.wait)
    waits.start()
    told = stacks.stacks_of(waits.ident)
    hangs.set()
    waits.join()
    assert "threading.py:" in told
    assert "in wait" in told


# -- who is to blame


def beat(rank, waits_for=(), stood=10.0, **fields):
    told = {
        "rank": rank,
        "number": 1,
        "host": "a",
        "machine": "a",
        "pid": 1,
        "parent": 1,
        "started": 1,
        "board": -1,
        "at": "",
        "op": "",
        "before": [],
        "line": "",
        "stood_seconds": stood,
        "waits_for": waits_for,
        "waits_on": "",
        "patience": 1,
        "has_left": False,
        "steps": 0,
        "worked_seconds": 0.0,
        "planned_seconds": 0.0,
    }
    return Beat(**told | fields)


def blamed(*beats, silent=(), waiter=0):
    return blame({each.rank: each for each in beats}, silent, waiter, timeout_seconds=10.0)


def test_a_beat_travels_as_text():
    assert heard(beat(3, [1, 2]).told()) == beat(3, [1, 2])


def test_the_chain_leads_to_who_waits_for_nobody():
    assert blamed(beat(0, [1]), beat(1, [2]), beat(2)) == Blame(1, (2,), silent=False)


def test_who_is_at_work_is_not_to_blame():
    assert blamed(beat(0, [1]), beat(1, [2]), beat(2, stood=9.0)) is None


def test_what_is_done_for_the_first_time_may_take_longer():
    assert blamed(beat(0, [1]), beat(1, patience=10)) is None
    assert blamed(beat(0, [1]), beat(1, patience=10, stood=100.0)) == Blame(0, (1,), silent=False)


def test_the_silent_come_first():
    beats = beat(0, [1, 2, 3]), beat(1), beat(2, [0, 1, 3]), beat(3, [2])
    assert blamed(*beats, silent=[3]) == Blame(0, (3,), silent=True)


def test_who_never_gave_a_sign_is_silent():
    assert blamed(beat(0, [1])) == Blame(0, (1,), silent=True)


def test_who_has_left_is_to_blame():
    assert blamed(beat(0, [1]), beat(1, has_left=True)) == Blame(0, (1,), silent=True)


def test_who_is_not_waited_for_is_not_to_blame():
    assert blamed(beat(0, [1]), beat(1, [0]), beat(2)) == Blame(0, (), silent=False)


def test_a_ring_is_one_when_all_have_waited_for_long():
    assert blamed(beat(0, [1]), beat(1, [0], stood=9.0)) is None


def test_a_ring_may_take_as_long_as_what_is_done_in_it():
    """All wait for all while a checkpoint is written."""
    assert blamed(beat(0, [1], patience=10), beat(1, [0], patience=10)) is None
    late = beat(0, [1], patience=10, stood=100.0), beat(1, [0], patience=10, stood=100.0)
    assert blamed(*late) == Blame(0, (), silent=False)


@pytest.mark.parametrize("ahead", [(), (0,)])
def test_the_silent_are_to_blame_where_no_wait_for_them_is_noted(ahead):
    beats = beat(0, [1]), beat(1, ahead), beat(2)
    assert blamed(*beats, silent=[2]) == Blame(0, (2,), silent=True)
    assert blamed(beat(0, [1]), beat(1, ahead, stood=9.0), beat(2), silent=[2]) is None


def test_a_pipeline_refuses_what_is_no_time():
    with pytest.raises(ConfigError, match="timeout=0 must be a number of seconds above 0"):
        make(timeout=0)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), "5", True])
def test_what_is_no_time_is_refused(timeout):
    with pytest.raises(ConfigError, match=r"timeout=.* must be a number of seconds above 0"):
        check_timeout(timeout)
