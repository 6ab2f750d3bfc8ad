"""Pipelines over processes: agreement on batches, the same results on every rank, and ranks that die."""

import os
import re
import select
import signal
import subprocess
import textwrap
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

import evenflow
from evenflow.errors import ConfigError
from evenflow.plan.plan import PlannedLink
from evenflow.runtime.recorded.microbatch import Microbatches, split
from evenflow.runtime.stages.stage import Stage
from evenflow.schedules.gpipe import gpipe
from evenflow.schedules.one_f_one_b import one_f_one_b
from forked import run_ranks
from preloaded import python
from small_runs import PLAN
from unsplit import mean_square, mlp, plain_step, regression, saved_model, sgd

# -- what two ranks do, all in one pair of processes: each function returns what the tests look at


def build() -> nn.Sequential:
    return mlp(4, 8, 8, 8, 1)


def make(model=None, **options):
    options = {
        "loss": mean_square,
        "example": regression(),
        "num_microbatches": 2,
        "optimizer": sgd,
    } | options
    return evenflow.pipeline(build() if model is None else model, **options)


def error_of(function):
    try:
        function()
    except Exception as error:  # noqa: BLE001 (it is what the test looks at)
        return type(error).__name__, str(error)
    return None


def is_first() -> bool:
    return dist.get_rank() == 0


def unread():
    """A loader that must not be read."""
    raise AssertionError("only the first rank reads")
    yield


def more_stages_than_processes(folder):
    return error_of(lambda: make(stages=3))


def fewer_stages_than_processes(folder):
    return error_of(lambda: make(split=[]))


def loaders_of_other_shapes(folder):
    pipe = make()
    found = error_of(lambda: pipe.step(regression(8 if is_first() else 6)))
    return found, float(pipe.step(regression()).loss)


def loaders_of_other_numbers(folder):
    pipe, batch = make(), regression()
    if not is_first():
        batch["x"][3, 2] += 1e-6
    return error_of(lambda: pipe.step(batch)), float(pipe.step(regression()).loss)


def loaders_of_other_values(folder):
    pipe = make()
    return error_of(lambda: pipe.step(regression() | {"extra": 1 if is_first() else 2}))


def a_batch_only_elsewhere(folder):
    pipe = make()
    return error_of(lambda: pipe.step(None if is_first() else regression()))


def a_refused_batch(folder):
    """One rank's batch is empty: it says so, and the other says whose fault it was."""
    pipe = make()
    found = error_of(lambda: pipe.step(regression(8 if is_first() else 0)))
    return found, float(pipe.step(regression()).loss)


def schedules_that_differ_later(folder):
    """The first rank orders three microbatches in its own way, and the second has no schedule for four."""

    def own(num_ranks, stages_per_rank, num_microbatches):
        if num_microbatches == 4 and not is_first():
            raise ConfigError("four are too many")
        return (gpipe if num_microbatches == 3 and is_first() else one_f_one_b)(
            num_ranks, stages_per_rank, num_microbatches
        )

    pipe = make(schedule=own, num_microbatches=None, microbatch_size=4)
    errors = [error_of(lambda size=size: pipe.step(regression(size))) for size in (12, 16)]
    return errors, float(pipe.step(regression()).loss)


def plans_that_differ_in_what_links_cost(folder):
    """The cuts and the order are the same, and only where transfers stand could differ."""
    links = (PlannedLink(0, 1, 1e-3 if is_first() else 2e-3, 0.0),)
    stages = tuple(replace(stage, first=first) for stage, first in zip(PLAN.stages, "04", strict=True))
    plan = replace(PLAN, stages=stages, links=links, max_leaf_share=0.0)
    return error_of(lambda: make(plan=plan, num_microbatches=None))


def fed(folder):
    pipe = make()
    losses = [
        float(pipe.step(batch).loss)
        for batch in pipe.feed([regression(8), regression(4), regression(8)] if is_first() else unread())
    ]
    return losses, {name: p.detach().clone() for name, p in pipe.named_parameters()}


def fed_from_a_failing_loader(folder):
    def failing():
        yield regression()
        raise OSError("the disk is gone")

    pipe, losses = make(), []

    def run():
        losses.extend(
            float(pipe.step(batch).loss) for batch in pipe.feed(failing() if is_first() else unread())
        )

    return error_of(run), losses, float(pipe.step(regression()).loss)


def fed_with_branches(folder):
    """The first rank's batch alone decides which way the program takes."""
    options = {"num_microbatches": None, "optimizer": None, "split": ["right"]}
    pipe = make(branching_model(), loss=branching, example=branches(1, -1), **options)
    data = [branches(*signs) for signs in SIGNS]
    return [float(pipe.step(batch).loss) for batch in pipe.feed(data if is_first() else unread())]


SIGNS = [(1, 1), (-1, 1, 1), (-1, -1)]


def branching_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 4), "left": nn.Linear(4, 4), "right": nn.Linear(4, 1)})


def branching(model, batch):
    h = model["a"](batch["x"])
    if (batch["x"] > 0).all():
        h = model["left"](h).tanh()
    return mean_square(lambda _: model["right"](h), batch)


def branches(*signs: int) -> Microbatches:
    items = [
        regression(2) | {"x": sign * (1 + torch.rand(2, 4, generator=seeded(at)))}
        for at, sign in enumerate(signs)
    ]
    return Microbatches(items)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def changing_what_it_has_twice(model, batch):
    """Changes a tensor in place that the batch holds under another name too, with an attribute on it."""
    factor = getattr(batch["x"], "factor", 1.0)
    batch["x"].mul_(2)
    return mean_square(model, {"x": batch["again"] * factor, "y": batch["y"]})


def twice(rows: int):
    items = split(regression(rows), 2)
    for item in items:
        item["x"].factor = 3.0
        item["again"] = item["x"]
    return Microbatches(items)


def fed_one_tensor_twice(folder):
    """A kind of microbatch that the other rank must record as the first one does."""
    pipe = make(
        loss=changing_what_it_has_twice,
        example=twice(8),
        num_microbatches=None,
        optimizer=None,
        split=["2"],
        reduction="item-mean",
    )
    return [float(pipe.step(batch).loss) for batch in pipe.feed([twice(4)] if is_first() else unread())]


def the_same_on_every_rank(folder):
    def loss(model, batch):
        prediction = model(batch["x"])
        return mean_square(lambda _: prediction, batch), {"p": prediction, "rows": len(prediction), "s": "x"}

    pipe = make(loss=loss)
    result = pipe.step(regression())
    evaluated = pipe.evaluate(regression(4))
    predicted = pipe.predict(regression(), lambda m, b: {"p": m(b["x"]), "kind": "k"})
    return (
        (result.loss, result.metrics),
        (evaluated.loss, evaluated.metrics),
        predicted,
        dist.get_rank() == 0,
        pipe.is_main,
    )


def owned(folder):
    model = build()
    pipe = make(model, split=["4"])
    pipe.step(regression())
    mine = [name for name, _ in pipe.named_parameters()]
    elsewhere = [name for name, p in model.named_parameters() if p.is_meta]
    return mine, elsewhere, [name for name, _ in pipe.named_gradients()]


def accumulated(folder):
    model = build()
    model[6].weight = nn.Parameter(torch.randn(1, 8, generator=seeded(0)))
    model[4].weight = model[2].weight  # used on both stages
    pipe = make(model, split=["4"])
    pipe.step(regression(8), update=False)
    before = {name: g.clone() for name, g in pipe.named_gradients()}
    pipe.step(regression(4))
    return before, {name: g.clone() for name, g in pipe.named_gradients()}


def saved(folder):
    pipe = make(split=["4"])
    for batch in pipe.feed([regression()] * 2 if is_first() else unread()):
        pipe.step(batch)
        pipe.save(folder / "checkpoint")
    return {name: p.detach().clone() for name, p in pipe.named_parameters()}


def frozen_stage(folder):
    model = build()
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    given = []

    def optimizer(parameters):
        given.extend(name for name, _ in parameters)
        return sgd(parameters)

    pipe = make(model, split=["4"], optimizer=optimizer)
    losses = [float(pipe.step(regression()).loss) for _ in range(2)]
    return given, losses, [name for name, _ in pipe.named_gradients()]


def generators(folder):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    pipe = make(model, split=["2"])
    pipe.step(regression())
    pipe.evaluate(regression())
    return torch.equal(torch.get_rng_state(), before)


def timelines(folder):
    pipe = make()
    for _ in range(2):
        pipe.step(regression())
    return [[str(span.op) for span in line.spans if span.is_compute] for line in pipe.timelines()]


def slow_to_send(folder):
    pipe = make()
    link, send = pipe._parts.link, pipe._parts.link.send
    link.send = lambda *args: (time.sleep(SENDING), send(*args))
    for _ in range(4):
        pipe.step(regression())
    predicted, _ = pipe.timelines()
    lanes = [list(zip(lane.end_seconds, lane.start_seconds[1:], strict=False)) for lane in predicted.lanes]
    num_forwards = sum(str(op).startswith("0F") for op in predicted.lanes[0].ops)
    return predicted.makespan_seconds / num_forwards, [end <= start for lane in lanes for end, start in lane]


def checked(folder):
    return error_of(lambda: make().check(regression()))


SENDING = 0.03  # seconds, where nothing else takes a tenth of that


SCENARIOS = [
    more_stages_than_processes,
    fewer_stages_than_processes,
    loaders_of_other_shapes,
    loaders_of_other_numbers,
    loaders_of_other_values,
    a_batch_only_elsewhere,
    a_refused_batch,
    schedules_that_differ_later,
    plans_that_differ_in_what_links_cost,
    fed,
    fed_from_a_failing_loader,
    fed_with_branches,
    fed_one_tensor_twice,
    the_same_on_every_rank,
    owned,
    accumulated,
    saved,
    frozen_stage,
    generators,
    timelines,
    slow_to_send,
    checked,
]


def run_scenarios(folder: Path):
    dist.init_process_group("gloo")
    return {scenario.__name__: scenario(folder) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@cache
def results(folder: Path):
    return evenflow.launch(run_scenarios, folder, nproc=2)


@pytest.fixture
def found(folder, request):
    """What the two ranks returned from the scenario that the test is named after."""
    name = request.node.name.removeprefix("test_")
    return [rank[name] for rank in results(folder)]


def plain_loss(batch, num: int = 2) -> float:
    return float(plain_step(build(), mean_square, split(batch, num)).loss)


def test_more_stages_than_processes(found):
    text = "3 stages need 3 processes, but 2 are running; start with torchrun --nproc-per-node 3, or ask for"
    assert found == [("ConfigError", f"{text} stages=2")] * 2


def test_fewer_stages_than_processes(found):
    assert [kind for kind, _ in found] == ["ConfigError"] * 2
    assert found[0][1].startswith("1 stages need 1 processes, but 2 are running")


def test_loaders_of_other_shapes(found):
    for error, loss in found:
        kind, text = error
        assert kind == "ConfigError"
        assert text == (
            "your loaders differ per rank: rank 0 has 2 microbatches of (float32[4, 4], float32[4, 1]), "
            "rank 1 has 2 microbatches of (float32[3, 4], float32[3, 1]); seed them alike, or read on the "
            "first rank alone: for batch in pipe.feed(loader)"
        )
        assert loss == plain_loss(regression())


def test_loaders_of_other_numbers(found):
    for error, loss in found:
        assert error is not None
        assert error[0] == "ConfigError"
        assert re.match(r"your loaders differ per rank: rank 0 has .* with other numbers \(or", error[1])
        assert loss == plain_loss(regression())


def test_loaders_of_other_values(found):
    assert all(error[1].startswith("your loaders differ per rank: ") for error in found)


def test_a_batch_only_elsewhere(found):
    text = "the first rank passed no batch; only the other ranks may leave that to pipe.feed(loader)"
    assert found == [("ConfigError", text)] * 2


def test_a_refused_batch(found):
    (theirs, first), (own, second) = found
    text = "the batch has no rows"
    assert own == ("ConfigError", text)
    assert theirs == ("PeerError", f"rank 1 refused its batch: {text}")
    assert first == second == plain_loss(regression())


def test_plans_that_differ_in_what_links_cost(found):
    for kind, text in found:
        assert kind == "ConfigError"
        assert text.startswith("ranks 0 and 1 recorded different programs")
        assert text.endswith("name the same schedule, or the same plan, on every rank")


def test_schedules_that_differ_later(found):
    (first, first_loss), (second, second_loss) = found
    text = (
        "ranks 0 and 1 have different schedules of 3 microbatches: name the same on every rank; a function "
        "must depend on its arguments alone"
    )
    assert first[0] == second[0] == ("ConfigError", text)
    assert first[1] == ("PeerError", "rank 1 has no schedule of 4 microbatches")
    assert second[1] == ("ConfigError", "four are too many")
    assert first_loss == second_loss == plain_loss(regression())


def test_fed(found):
    (losses, first), (again, second) = found
    assert losses == again
    twin = build()
    pipe = make(twin, stages=1, device="cpu")
    assert losses == [float(pipe.step(regression(rows)).loss) for rows in (8, 4, 8)]
    assert all(torch.equal(p, (first | second)[name]) for name, p in twin.named_parameters())


def test_fed_from_a_failing_loader(found):
    (own, first, after), (theirs, second, after_too) = found
    assert own == ("OSError", "the disk is gone")
    assert theirs == ("PeerError", "rank 0's loader failed: OSError: the disk is gone")
    assert first == second == [plain_loss(regression())]
    assert after == after_too, "the ranks are still together"


def test_fed_with_branches(found):
    expected = [
        float(plain_step(branching_model(), branching, branches(*signs).items).loss) for signs in SIGNS
    ]
    assert found == [expected] * 2


def test_fed_one_tensor_twice(found):
    expected = [float(changing_what_it_has_twice(build(), item).detach()) for item in twice(4).items]
    assert found == [[pytest.approx(sum(expected) / 2)]] * 2


def test_the_same_on_every_rank(found):
    first, second = found
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert mine[1].keys() == theirs[1].keys()
        assert torch.equal(mine[1]["p"], theirs[1]["p"])
        assert (mine[1]["rows"], mine[1]["s"]) == (theirs[1]["rows"], theirs[1]["s"])
    assert first[0][1]["rows"] == 8
    assert first[1][1]["rows"] == 4
    assert torch.equal(first[2]["p"], second[2]["p"])
    assert first[2]["kind"] == second[2]["kind"] == "k"
    assert [rank[3:] for rank in found] == [(True, True), (False, False)]


def test_owned(found):
    (first, absent_first, gradients_first), (second, absent_second, gradients_second) = found
    assert first == absent_second == gradients_first == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert second == absent_first == gradients_second == ["4.weight", "4.bias", "6.weight", "6.bias"]


def test_accumulated(found):
    twin = build()
    twin[6].weight = nn.Parameter(torch.randn(1, 8, generator=seeded(0)))
    twin[4].weight = twin[2].weight
    for at, sizes in enumerate([(8,), (8, 4)]):
        merged = {name: gradient for rank in found for name, gradient in rank[at].items()}
        twin.zero_grad()
        mean_square(
            twin, {k: torch.cat([regression(size)[k] for size in sizes]) for k in ("x", "y")}
        ).backward()
        assert merged.keys() == dict(twin.named_parameters()).keys()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(merged[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_saved(found, folder):
    model = saved_model(folder / "checkpoint")
    merged = found[0] | found[1]
    assert all(torch.equal(parameter, merged[name]) for name, parameter in model.items())
    assert not (folder / "checkpoint.partial").exists()


def test_frozen_stage(found):
    (first, losses, no_gradients), (second, again, gradients) = found
    assert first == no_gradients == []
    assert second == gradients == ["4.weight", "4.bias", "6.weight", "6.bias"]
    assert losses == again
    assert losses[1] < losses[0]


def test_generators(found):
    assert found == [True, True]


def test_checked(found):
    for kind, text in found:
        assert kind == "ConfigError"
        assert text.startswith("check runs the whole model in one process; here are 2: run `evenflow check")


def test_timelines(found):
    expected = sorted(
        f"{stage}{kind}{microbatch}" for stage in range(2) for kind in "FB" for microbatch in range(2)
    )
    for predicted, measured in found:
        assert sorted(predicted) == sorted(measured) == expected


def test_slow_to_send(found):
    for seconds_each, one_after_another in found:
        assert seconds_each > SENDING  # each forward of the first rank is followed by a send
        assert all(one_after_another)


# -- a rank that dies


def die_in_step(rank: int, folder: Path) -> None:
    """Train; in the second step rank 1 is killed within a forward of its stage."""
    pipe = make(num_microbatches=4)
    pipe.step(regression())
    whole = Stage.run_forward

    def dying(stage, flight, *args, **options):
        if stage.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(stage, flight, *args, **options)

    Stage.run_forward = dying
    pipe.step(regression())


def test_ranks_end_and_name_the_one_that_was_killed_in_mid_step(tmp_path):
    first, killed, last = run_ranks(die_in_step, tmp_path, num_ranks=3, within_seconds=60)
    assert killed.exit_code == -signal.SIGKILL
    for rank, other in ((0, first), (2, last)):
        assert other.exit_code == 1, "it ended by itself"
        assert re.search(rf"PeerError: rank {rank} lost (rank 1|its peer) ", other.printed)


def fail_in_step(rank: int, folder: Path) -> None:
    """Rank 1's stage raises in the second step."""
    pipe = make(num_microbatches=4)
    pipe.step(regression())

    def failing(*_, **__):
        raise ZeroDivisionError("the seventh layer")

    if rank == 1:
        Stage.run_backward = failing
    pipe.step(regression())


def test_a_rank_that_fails_in_mid_step_tells_its_op(tmp_path):
    other, failed = run_ranks(fail_in_step, tmp_path, num_ranks=2, within_seconds=60)
    assert failed.exit_code == other.exit_code == 1
    assert "ZeroDivisionError: the seventh layer" in failed.printed
    assert "evenflow: rank 1 failed in 1B0, step 1" in failed.printed
    assert re.search(r"PeerError: rank 0 lost (rank 1|its peer) ", other.printed)


# -- under torchrun


def has_ended(pid: int) -> bool:
    """Wait for a process to end, woken by its end and not by a clock."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 10.0)[0])
    finally:
        os.close(descriptor)


def assert_all_ended(folder: Path, num_ranks: int) -> None:
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    assert len(pids) == num_ranks
    assert all(has_ended(pid) for pid in pids)


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import torch, evenflow
    from evenflow.runtime.stages.stage import Stage

    torch.manual_seed(0)
    (Path(sys.argv[1]) / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    pipe = evenflow.pipeline(
        model,
        loss=lambda model, batch: model(batch).square().mean(),
        example=torch.ones(8, 4),
        schedule="1f1b",
    )
    pipe.step(torch.ones(8, 4))
    print("stepped", flush=True)
    whole = Stage.run_backward

    def dying(stage, flight, **options):
        if stage.index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(stage, flight, **options)

    Stage.run_backward = dying
    pipe.step(torch.ones(8, 4))
"""


def test_under_torchrun_a_killed_rank_ends_the_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    started = time.monotonic()
    command = [*python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, script, tmp_path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert time.monotonic() - started < 30
    assert done.stdout.count("stepped") == 2
    assert re.search(r"rank\s*: 0 .*\n.*exitcode\s*: -9", done.stderr), done.stderr
    assert_all_ended(tmp_path, 2)
