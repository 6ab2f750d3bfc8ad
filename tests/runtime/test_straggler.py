"""Stragglers: who is told of, when, with which numbers; and one that is real."""

import threading

import evenflow
from evenflow.ir.costs import Costs
from evenflow.ir.op import Backward, Forward, Payload, Recv, Send
from evenflow.runtime.notes.clocks import HostClock
from evenflow.runtime.notes.log import Log
from evenflow.runtime.notes.script import script
from evenflow.runtime.notes.straggler import WINDOW_STEPS, Pace, Stragglers, pace_of
from evenflow.runtime.stages.stage import Stage
from forked import run_ranks
from unsplit import mean_square, mlp, regression, sgd


def judged(*windows, planned=None):
    """What is told after each window, of the seconds that each rank worked."""
    stragglers = Stragglers()
    return [
        [
            (each.rank, each.since_step, round(each.ratio, 3), round(each.others_ratio, 3), each.ended)
            for each in stragglers.judge(
                WINDOW_STEPS * number,
                {
                    rank: Pace(seconds, planned[rank] if planned else 0.0)
                    for rank, seconds in enumerate(window)
                },
            )
        ]
        for number, window in enumerate(windows, start=1)
    ]


def test_a_rank_is_told_of_when_it_was_slow_for_three_windows():
    slow = [1.0, 3.0, 1.1]
    assert judged(slow, slow, slow, slow, planned=[1.0, 2.0, 1.0]) == [[], [], [(1, 8, 1.5, 1.05, False)], []]


def test_one_quick_window_begins_anew():
    slow, quick = [1.0, 1.4, 1.0], [1.0, 1.25, 1.0]
    told = judged(slow, slow, quick, slow, slow, slow, planned=[1.0, 1.0, 1.0])
    assert told == [[], [], [], [], [], [(1, 32, 1.4, 1.0, False)]]


def test_what_slows_all_makes_no_straggler():
    assert judged(*[[3.0, 3.1, 2.9]] * 5, planned=[1.0, 1.0, 1.0]) == [[]] * 5


def test_it_is_told_of_again_only_when_it_changes():
    windows = [[1.0, 1.5]] * 4 + [[1.0, 1.8]] + [[1.0, 1.9]] + [[1.0, 1.2], [1.0, 1.0], [1.0, 1.0]]
    told = judged(*windows, planned=[1.0, 1.0])
    assert [len(each) for each in told] == [0, 0, 1, 0, 0, 1, 0, 1, 0]
    assert told[5] == [(1, 8, 1.9, 1.0, False)]
    assert told[7] == [(1, 64, 1.0, 1.0, True)]


def test_without_a_plan_it_is_compared_with_its_own_first_steps():
    first = [[9.0, 9.0], [1.0, 2.0], [1.2, 2.0], [1.0, 2.0]]  # the first warms up
    told = judged(*first, *[[1.0, 3.0]] * 3)
    assert told == [[], [], [], [], [], [], [(1, 40, 1.5, 1.0, False)]]


def test_stages_that_were_always_unequal_make_no_straggler():
    assert judged(*[[1.0, 5.0]] * 9) == [[]] * 9


def test_one_rank_alone_is_none():
    assert judged(*[[3.0]] * 5, planned=[1.0]) == [[]] * 5


def test_the_sentence_has_the_numbers():
    stragglers = Stragglers()
    works = {0: Pace(0.1, 0.1), 1: Pace(0.3, 0.15)}
    (found,) = [each for step in (8, 16, 24) for each in stragglers.judge(step, works)]
    assert found.told("node7") == (
        "rank 1 (node7) is a straggler: it computes for 0.3 s a step, 2.00 times the 0.15 s planned, the "
        "other ranks for 1.00 times theirs; since step 8"
    )


def test_work_is_what_was_computed_and_what_of_it_was_planned():
    ops = [Forward(0, 0), Send(0, 1, 0, Payload.ACTIVATION), Recv(1, 0, 0, Payload.GRADIENT), Backward(0, 0)]
    logs = []
    for slow in (1.0, 1.0, 4.0):
        marks = [(0.0, 0.0, slow), (slow, slow, 9.0), (9.0, 9.0, 9.5), (9.5, 20.0, 20.0 + 2 * slow)]
        logs.append([Log(0, script(ops).lines, HostClock(), marks)])
    assert pace_of(logs, None) == Pace(3.0, 0.0)
    assert pace_of(logs, Costs.uniform(2, 0.5, 0.25, 0.5)) == Pace(3.0, 1.25)


# -- a real one


def slows_down(rank, folder):
    """From some step on, each forward of rank 1 takes much longer."""
    pipe = evenflow.pipeline(
        mlp(4, 8, 8, 1),
        loss=mean_square,
        example=regression(),
        num_microbatches=2,
        optimizer=sgd,
        timeout=1.0,  # the watchdog looks at steps twenty times within it
    )
    whole = Stage.run_forward

    def slower(seconds):
        def run(*args, **options):
            threading.Event().wait(seconds[rank])
            return whole(*args, **options)

        return run

    told = folder / "stderr0"
    Stage.run_forward = slower([0.002, 0.002])
    for step in range(1000):
        if step == 100:
            Stage.run_forward = slower([0.002, 0.02])
        stop = "is a straggler" in told.read_text() if rank == 0 else None
        if pipe._parts.mesh.world.share(stop, source=0):
            break
        pipe.step(regression())
    (folder / f"step{rank}").write_text(str(step))


def test_a_rank_that_becomes_slow_is_told_of_once_on_the_main_rank(tmp_path):
    ended = run_ranks(slows_down, tmp_path, num_ranks=2, within_seconds=60)
    assert [rank.exit_code for rank in ended] == [0, 0]
    (line,) = [line for line in ended[0].printed.splitlines() if "straggler" in line]
    assert line.startswith("rank 1 (")
    assert "times the" in line
    assert "that it took at first, the other ranks for" in line
    assert ended[1].printed == ""
    assert 100 < int((tmp_path / "step0").read_text()) < 999
