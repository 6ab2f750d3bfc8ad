"""Out of memory: one report of where it was, what was there, and what would help; and the run goes on."""

import re
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.errors import EvenflowError, OutOfMemoryError
from evenflow.runtime.notes.no_memory import is_out_of_memory

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the process's memory is limited by what Linux tells of it"
)

WIDTH, LAYERS, MICROBATCHES, ROWS = 128, 8, 8, 1024
ROOM_BYTES = 100 * 2**20


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.grow, self.shrink = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.shrink(F.gelu(self.grow(x)))


def pipe_and_batch(schedule="gpipe", stages=2, optimizer=torch.optim.AdamW):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(LAYERS)), nn.Linear(WIDTH, 1))
    batch = {
        "x": torch.randn(ROWS * MICROBATCHES, WIDTH),
        "y": torch.randn(ROWS * MICROBATCHES, 1),
    }
    pipe = evenflow.pipeline(
        model,
        loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
        example=batch,
        optimizer=lambda named: optimizer([p for _, p in named], lr=1e-3),
        stages=stages,
        schedule=schedule,
        num_microbatches=MICROBATCHES,
    )
    return pipe, batch


def with_room(room_bytes, act):
    """Act with so much more memory than the process has mapped."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room_bytes, resource.RLIM_INFINITY))
    try:
        return act()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fails_and_goes_on():
    """What is reported; the losses afterwards, and those of a run in which nothing failed."""
    pipe, batch = pipe_and_batch()
    few = {name: each[:MICROBATCHES] for name, each in batch.items()}
    pipe.step(few, update=False)  # so that nothing is made for the first time later on
    pipe.step(few)
    try:
        with_room(ROOM_BYTES, lambda: pipe.step(batch))
    except EvenflowError as error:
        report = type(error).__name__, str(error), type(error.__cause__).__name__
    after = [float(pipe.step(few).loss) for _ in range(2)]
    other, _ = pipe_and_batch()
    other.step(few, update=False)
    other.step(few)
    return report, after, [float(other.step(few).loss) for _ in range(2)]


@pytest.fixture(scope="module")
def outcome():
    (found,) = evenflow.launch(fails_and_goes_on, nproc=1)
    return found


def test_the_report_says_where(outcome):
    (kind, message, cause), _, _ = outcome
    assert (kind, cause) == ("OutOfMemoryError", "RuntimeError")
    first = message.splitlines()[0]
    assert re.match(
        r"out of memory on rank [01] \(cpu, .* [GM]iB\), stage [01], in [01]F\d of step 2: .*allocate", first
    )


def test_the_report_lays_what_was_planned_beside_what_was_there(outcome):
    (_, message, _), _, _ = outcome
    rows = {
        name: re.findall(r"[\d.,]+ (?:[KMGT]iB|B)", rest)
        for name, rest in re.findall(r"^(\w+(?: \w+)*?)  +(.*)$", message, re.MULTILINE)
    }
    assert rows["parameters"][0] == rows["parameters"][1] == "4.0 MiB"
    assert rows["optimizer"][0] == rows["optimizer"][1] == "8.0 MiB"
    planned, measured = (float(rows["together"][at].split()[0].replace(",", "")) for at in range(2))
    assert planned > 200
    assert measured > 100
    assert "(7 microbatches x 2.0 MiB)" in message or "microbatches x 2.0 MiB)" in message


def test_the_report_names_what_would_help(outcome):
    (_, message, _), _, _ = outcome
    head, *told = message[message.index("what would help") :].splitlines()
    now = float(re.search(r"needs? ([\d.]+) MiB:", head)[1])
    assert len(told) >= 2
    for line in told:
        after, seconds = re.search(r": ([\d.]+) MiB, and a step takes ([\d.]+) times as long", line).groups()
        assert float(after) < 0.98 * now
        assert 0.3 < float(seconds) < 3
    assert 'schedule="' in message


def test_a_run_goes_on_after_it_as_if_nothing_had_been(outcome):
    _, after, undisturbed = outcome
    assert after == undisturbed


def runs_out_on_one():
    pipe, batch = pipe_and_batch()
    few = {name: each[:MICROBATCHES] for name, each in batch.items()}
    pipe.step(few)
    if pipe.is_main:
        with_room(ROOM_BYTES // 2, lambda: pipe.step(batch))
    else:
        pipe.step(batch)


def test_of_several_processes_the_one_that_ran_out_reports():
    where = r"rank 0: out of memory on rank 0 .* stage 0, in 0F\d"
    with pytest.raises(OutOfMemoryError, match=where) as caught:
        evenflow.launch(runs_out_on_one, nproc=2)
    assert "what would help" in str(caught.value)


class Greedy(torch.optim.SGD):
    is_greedy = True

    def step(self, closure=None):
        if self.is_greedy:
            raise torch.OutOfMemoryError("no room for what the update needs")
        return super().step(closure)


def gradients(pipe):
    return {name: gradient.clone() for name, gradient in pipe.named_gradients()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def few_rows(batch):
    return {name: each[:MICROBATCHES] for name, each in batch.items()}


def test_an_update_that_fails_leaves_no_gradient(monkeypatch):
    pipe, batch = pipe_and_batch(optimizer=Greedy)
    with pytest.raises(OutOfMemoryError, match=r"in the optimizer's update of step 0: no room for what"):
        pipe.step(few_rows(batch))
    monkeypatch.setattr(Greedy, "is_greedy", False)
    pipe.step(few_rows(batch))
    other, _ = pipe_and_batch(optimizer=Greedy)
    other.step(few_rows(batch))
    assert same(gradients(pipe), gradients(other))


@pytest.mark.parametrize("act", ["evaluate", "predict"])
def test_an_evaluation_that_fails_drops_no_gradient(monkeypatch, act):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("no room for it")

    pipe, batch = pipe_and_batch(optimizer=torch.optim.SGD)
    other, _ = pipe_and_batch(optimizer=torch.optim.SGD)
    for each in (pipe, other):
        each.step(few_rows(batch), update=False)
    given = [few_rows(batch), *([lambda m, b: m(b["x"])] if act == "predict" else [])]
    with monkeypatch.context() as patch:
        patch.setattr("evenflow.runtime.program.work.Work.run", fails)
        with pytest.raises(OutOfMemoryError, match="no room for it") as caught:
            getattr(pipe, act)(*given)
    assert "what would help" not in str(caught.value), "it is no training step"
    for each in (pipe, other):
        each.step(few_rows(batch))
    assert same(gradients(pipe), gradients(other))


def test_memory_that_nobody_tells_of_is_left_out(monkeypatch):
    monkeypatch.setattr("evenflow.pipe.step.exhausted.resident_bytes", lambda when: None)
    pipe, batch = pipe_and_batch(optimizer=Greedy)
    with pytest.raises(OutOfMemoryError) as caught:
        pipe.step(few_rows(batch))
    assert "all the rest" not in str(caught.value)
    assert re.search(r"^together +[\d.]+ [GM]iB$", str(caught.value), re.MULTILINE)


def test_what_cannot_be_reported_hides_nothing(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory for the report")

    monkeypatch.setattr("evenflow.pipe.step.exhausted.estimate", fails)
    pipe, batch = pipe_and_batch(optimizer=Greedy)
    with pytest.raises(OutOfMemoryError, match="no room for what the update needs"):
        pipe.step(few_rows(batch))


def test_sparse_gradients_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 8, sparse=True), nn.Linear(8, 1))
    batch = {"x": torch.randint(0, 64, (8,)), "y": torch.randn(8, 1)}
    pipe = evenflow.pipeline(
        model,
        loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
        example=batch,
        optimizer=lambda named: Greedy([p for _, p in named], lr=0.1),
        stages=1,
        num_microbatches=2,
    )
    with pytest.raises(OutOfMemoryError) as caught:
        pipe.step(batch)
    (told,) = re.findall(r"^gradients +\S+ \S+ +(\S+) B$", str(caught.value), re.MULTILINE)
    assert int(told) > 8 * 8


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied: out of memory"), False),
        (ValueError("memory"), False),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(24, "Too many open files"), False),
    ],
)
def test_what_is_taken_for_it(error, is_one):
    assert is_out_of_memory(error) is is_one
