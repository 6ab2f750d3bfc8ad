"""Bad numbers: where the first one was made, on any cut, and that nothing of such a step stays."""

import copy
import logging
import math
import re
from functools import cache

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.cli.job import Flags, make_job
from evenflow.cli.main import main
from evenflow.cli.step_log import StepLog
from evenflow.errors import BadNumbersError, ConfigError
from evenflow.pipe.faults.bad_numbers import MOST_SKIPS
from evenflow.pipe.faults.first_bad import FromGradient, Noted, first_bad
from evenflow.runtime.stages.finite import Count, is_finite
from evenflow.runtime.stages.nan_watch import BadGradient, Place
from evenflow.runtime.stages.stage import Stage
from small_models import assert_same_bits, train

CUTS = [(1, "1f1b"), (2, "1f1b"), (2, "zb-auto"), (4, "zb-auto"), (4, "interleaved-1f1b"), (4, "zb-v")]
ROWS, NUM_MICROBATCHES = 8, 4


class Log(nn.Module):
    """Adds the logarithm of `s`, 0 where that is 1."""

    def forward(self, h, s):
        return h + torch.log(h * 0 + s)


class Root(nn.Module):
    """Multiplies by the root of `s`; at 0 its slope is infinite."""

    def forward(self, h, s):
        return h * torch.sqrt(h * 0 + s)


class Fragile(nn.Module):
    def __init__(self, dropout=0.0, *, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.log, self.root = Log(), Root()

    def forward(self, batch):
        h = self.log(self.dropout(torch.tanh(self.a(batch["x"]))), batch["log"])
        return self.c(self.root(torch.tanh(self.b(self.norm(h))), batch["root"]))


def loss(model, batch):
    return F.mse_loss(model(batch), batch["y"])


def data(seed=0, *, log=None, root=None):
    """A batch; `log` and `root` are rows in which these modules make bad numbers."""
    generator = torch.Generator().manual_seed(seed)
    batch = {name: torch.randn(ROWS, size, generator=generator) for name, size in (("x", 4), ("y", 1))}
    batch |= {name: torch.ones(ROWS, 1) for name in ("log", "root")}
    if log is not None:
        batch["log"][log] = -1.0
    if root is not None:
        batch["root"][root] = 0.0
    return batch


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def make(model=None, **options) -> evenflow.Pipeline:
    given = {"loss": loss, "example": data(), "optimizer": adam, "num_microbatches": NUM_MICROBATCHES}
    given |= {"bad_numbers": "stop", "max_leaf_share": 0.0, "device": "cpu"}
    return evenflow.pipeline(Fragile() if model is None else model, **(given | options))


def refusal(pipe, batch, **options) -> str:
    with pytest.raises(BadNumbersError) as caught:
        pipe.step(batch, **options)
    return str(caught.value)


def test_steps_that_were_left_out_have_no_loss_in_a_run():
    pipe = make(stages=2, bad_numbers="skip")
    log = StepLog(pipe, num_steps=0, device="cpu")
    for batch in (data(), data(root=0), data(seed=1)):
        log.step(batch)
    found = pipe.evaluate(data(root=0)).loss
    assert math.isfinite(found), "its gradients alone are bad"
    assert [math.isfinite(loss) for loss in log.losses] == [True, False, True]


def stage_of(pipe, name: str) -> int:
    sections = pipe._parts.recordings.entries[0].cut.sections
    (stage,) = {s.stage for s in sections for node in s.nodes if node.name == name}
    return stage


def where(pipe, name: str, microbatch: int) -> str:
    stage = stage_of(pipe, name)
    rank = pipe._parts.programs.placement.rank_of[stage]
    return f"microbatch {microbatch} on stage {stage} (rank {rank})"


def weights(pipe):
    return {name: parameter.detach().clone() for name, parameter in pipe.named_parameters()}


def everything(pipe):
    """All that a step may change, as plain data."""
    state = copy.deepcopy(pipe.state_dict())
    del state["step"]
    return state


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


# -- where it began


@pytest.mark.parametrize("find_nan", [False, True])
@pytest.mark.parametrize(("stages", "schedule"), CUTS)
def test_a_forward_is_named(stages, schedule, find_nan):
    pipe = make(Fragile(0.3), stages=stages, schedule=schedule, find_nan=find_nan)
    pipe.step(data())
    text = refusal(pipe, data(1, log=5))
    assert text.startswith("step 1 has bad numbers: its loss is nan. They began in the forward of ")
    assert f"{where(pipe, 'log:log', 2)}: log:log made 8 bad of 16 numbers (8 nan)" in text
    assert "; its inputs were finite, 1 at most in size. " in text


@pytest.mark.parametrize("find_nan", [False, True])
@pytest.mark.parametrize(("stages", "schedule"), CUTS)
def test_a_backward_is_named(stages, schedule, find_nan):
    pipe = make(Fragile(0.3), stages=stages, schedule=schedule, find_nan=find_nan)
    pipe.step(data())
    text = refusal(pipe, data(1, root=3))
    assert re.match(
        r"step 1 has bad numbers: its loss is [\d.]+, but the norm of its gradients is nan\. ", text
    )
    assert "They began in the backward of " in text
    assert (
        f"{where(pipe, 'root:sqrt', 1)}: root:sqrt (SqrtBackward0) made 8 bad of 16 numbers (8 inf)" in text
    )


@pytest.mark.parametrize(("stages", "schedule"), CUTS)
def test_a_parameter_is_named(stages, schedule):
    pipe = make(stages=stages, schedule=schedule)
    with torch.no_grad():
        dict(pipe.named_parameters())["b.weight"][3, 2] = math.inf
    text = refusal(pipe, data())
    assert (
        "They came in with the parameter b.weight, 1 bad of 64 numbers (1 inf), which b is the first" in text
    )
    assert where(pipe, "b", 0) in text


@pytest.mark.parametrize(("stages", "schedule"), CUTS)
def test_a_tensor_of_the_batch_is_named(stages, schedule):
    pipe, batch = make(stages=stages, schedule=schedule), data()
    batch["y"][6] = math.nan
    text = refusal(pipe, batch)
    assert "They came in with the batch's tensor ['y'], 1 bad of 2 numbers (1 nan), which mse_loss is" in text
    assert where(pipe, "mse_loss", 3) in text


def test_the_first_microbatch_is_named_and_forward_before_backward():
    pipe, batch = make(stages=2), data(log=7, root=0)
    batch["log"][4] = -1.0
    assert where(pipe, "log:log", 2) in refusal(pipe, batch)


def test_inside_a_module_that_stays_whole_the_function_is_named():
    pipe = make(stages=2, atomic=[Log])
    assert ": log (inside, log was the first) made 8 bad" in refusal(pipe, data(log=0))


def test_a_mask_is_not_to_blame():
    """Its infinities are meant; a row that is masked altogether is what makes a NaN."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c, self.log = nn.Linear(4, 4), nn.Linear(4, 1), Log()
            self.register_buffer("mask", torch.zeros(4).index_fill(0, torch.tensor([1]), -math.inf))

        def forward(self, batch):
            least = torch.finfo(torch.float32).min * batch["hide"]
            least = least + least  # a mask that nobody asked to be infinite
            h = self.log(self.a(batch["x"]), batch["log"]).masked_fill(batch["hide"], -math.inf)
            return self.c((h + self.mask + least).softmax(-1))

    batch = data() | {"hide": torch.zeros(ROWS, 4, dtype=torch.bool)}
    batch["hide"][:, 3] = True
    endless = batch | {"x": batch["x"].clone()}
    endless["x"][5] = math.inf
    pipe = make(Masked(), example=batch, stages=2)
    pipe.step(batch)
    text = refusal(pipe, batch | {"log": data(log=5)["log"]})
    assert "microbatch 2 on stage 0 (rank 0): log:log made 4 bad of 8" in text
    assert "They came in with the batch's tensor ['x'], 4 bad of 8 numbers (4 inf), which a is " in refusal(
        pipe, endless
    )


@pytest.mark.parametrize("find_nan", [False, True])
def test_a_row_that_is_masked_altogether(find_nan):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 1)
            self.register_buffer("mask", torch.zeros(4).index_fill(0, torch.tensor([1]), -math.inf))

        def forward(self, batch):
            h = self.a(batch["x"]).masked_fill(batch["hide"], -math.inf)
            return self.c((h + self.mask).softmax(-1))

    batch = data() | {"hide": torch.zeros(ROWS, 4, dtype=torch.bool)}
    batch["hide"][:, 3] = True
    pipe = make(Masked(), example=batch, stages=2, find_nan=find_nan)
    pipe.step(batch)
    hidden = batch | {"hide": batch["hide"].clone()}
    hidden["hide"][2] = True
    text = refusal(pipe, hidden)
    assert "softmax made 4 bad of 8 numbers (4 nan); its inputs held no nan, but 6 infinities" in text


def test_a_change_in_place_is_named():
    class InPlace(Fragile):
        def forward(self, batch):
            return self.c(self.a(batch["x"]).add(batch["log"] * 9).log_())

    text = refusal(make(InPlace(), stages=2), data(log=5))
    assert re.search(r": log_ made \d+ bad of 16 numbers \(\d+ nan\); its inputs were finite\. ", text)


def test_the_gradient_of_a_weight_is_named_where_schedules_put_it_off():
    class Steep(Fragile):
        def forward(self, batch):
            return self.b(torch.tanh(self.a(batch["x"])) * 1e20)

    model = Steep()
    with torch.no_grad():
        model.b.weight *= 1e-20
    pipe = make(
        model, loss=lambda model, batch: model(batch).mean() * 1e25, stages=2, schedule="zb-auto", split=["b"]
    )
    text = refusal(pipe, data())
    found = r"in the backward of microbatch 0 on stage 1 \(rank 1\): b \(\w+\) made (\d+) bad of 64 numbers"
    assert re.search(found + r" \(.*\) in the gradient of b\.weight; the gradient that came to it was", text)


def test_of_several_gradients_the_first_of_a_backward_is_named():
    made, came = Count(2, num_inf=2), Count(2, largest=1.0)
    at = [Place(1, 9, 1, 1), Place(0, 2, 0, 0), Place(0, 5, 1, 1)]
    gradients = [BadGradient(place, "SqrtBackward0", made, came, None) for place in at]
    found = first_bad([Noted((), gradients[:2]), Noted((), gradients[2:])], None, loss=False, anywhere=False)
    assert found == FromGradient(gradients[2], was_bad=False)


def test_what_torch_where_hides_from_the_loss_is_found_in_the_gradient():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, batch):
            h = self.a(batch["x"])
            return self.c(torch.where(h > 0, torch.sqrt(h), 0.0))

    text = refusal(make(Hidden(), stages=2), data())
    assert "They began in the backward of microbatch 0" in text
    assert "sqrt (SqrtBackward0) made" in text
    assert "Its forward had made bad numbers too" in text
    text = refusal(make(Hidden(), stages=2, find_nan=True), data())
    assert "but not all that it was made of is finite" in text or "They began in the forward" in text


@pytest.mark.parametrize("recompute", ["full", None])
def test_draws_and_buffers_are_those_of_the_step(recompute):
    """What is bad depends on dropout, and on statistics that the step's own forward has changed."""

    class Dropped(Fragile):
        def forward(self, batch):
            h = self.dropout(torch.ones(len(batch["x"]), 256) + self.a(batch["x"])[:, :1] * 0)
            return self.c(torch.log(h)[:, :8] + self.norm(self.b(batch["x"] @ torch.ones(4, 8))))

    texts = []
    for find_nan in (True, False):
        model = Dropped(0.1, norm=True)
        pipe = make(model, stages=2, find_nan=find_nan, bad_numbers="stop", recompute=recompute)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        texts.append(refusal(pipe, data()))
        assert_same(dict(model.named_buffers()), before)
    assert texts[0] == texts[1]
    assert re.search(
        r"log made \d+ bad of 512 numbers \(\d+ inf\); its inputs were finite, 1\.11 at", texts[0]
    )


def test_a_step_is_run_again_with_the_buffers_that_it_began_with():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, h):
            self.count += 1
            return h + torch.log((self.count - 6).abs() + h * 0)

    class Counted(Fragile):
        def __init__(self):
            super().__init__()
            self.counting = Counting()

        def forward(self, batch):
            return self.c(self.counting(self.a(batch["x"])))

    pipe = make(Counted(), stages=2)
    pipe.step(data())
    for _ in range(2):  # and is so again: it was put back
        assert re.search(r"microbatch 1 on .*: counting.* made 16 bad of 16 numbers", refusal(pipe, data()))


def test_finite_gradients_whose_norm_is_too_large():
    pipe = make(stages=2, loss=lambda model, batch: loss(model, batch) * 1e25)
    text = refusal(pipe, data())
    assert "All gradients are finite, and their norm is too large for float32" in text


# -- what is no bad number


def test_a_microbatch_that_weighs_nothing_may_be_without_a_loss():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    batch = {"x": torch.randn(ROWS, 4), "t": torch.tensor([0, 1, 2, 0, -100, -100, 1, 1])}
    pipe = make(
        model,
        loss=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["t"]),
        example=batch,
        stages=2,
        find_nan=True,
    )
    assert pipe.step(batch).bad_numbers is None


def test_an_overflow_in_float16_is_none_but_a_bad_loss_is():
    pipe = make(stages=2, precision="fp16")
    scale = pipe._parts.updater.rules.loss_scale
    scale.factor = 1e38
    result = pipe.step(data())
    assert result.bad_numbers is None
    assert not math.isfinite(float(result.grad_norm))
    assert scale.factor == 5e37
    assert "log:log made 8 bad" in refusal(pipe, data(log=1))
    assert scale.factor == 5e37


@pytest.mark.parametrize(("stages", "schedule"), CUTS)
def test_watching_changes_no_bit(stages, schedule):
    found = []
    for options in ({"bad_numbers": None}, {"find_nan": True}, {"bad_numbers": "skip"}):
        pipe = make(Fragile(0.3, norm=True), stages=stages, schedule=schedule, **options)
        found.append(([float(pipe.step(data(seed)).loss) for seed in range(3)], everything(pipe)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_watching_finds_nothing_in_sound_models(name):
    options = {"stages": 2, "schedule": "zb-auto", "dropout": 0.1, "num_steps": 2}
    assert_same_bits(train(name, find_nan=True, **options), train(name, **options))


@pytest.fixture
def _unset_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Buffered(Fragile):
    """Fills memory of its own in parts."""

    def forward(self, batch):
        h = self.a(batch["x"])
        into = torch.empty(len(h), 16)
        into[:, 8:] = torch.zeros_like(h)
        into[:, :8] = h
        return self.c(self.log(into[:, :8], batch["log"]) + torch.empty_like(h).fill_(0.5) * 0)


@pytest.mark.usefixtures("_unset_memory_is_nan")
def test_memory_that_nobody_has_written_is_not_to_blame():
    pipe = make(Buffered(), stages=2, find_nan=True)
    assert pipe.step(data()).bad_numbers is None
    assert ": log:log made 8 bad of 16 numbers" in refusal(pipe, data(log=5))


# -- what becomes of the step


def test_an_error_of_the_run_that_looks_does_not_hide_the_bad_numbers(monkeypatch):
    model = Fragile(norm=True)
    pipe = make(model, stages=2)
    pipe.step(data())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    whole, runs = Stage.run_backward, []

    def failing(*args, **options):
        runs.append(whole)
        if len(runs) > 2 * NUM_MICROBATCHES:
            raise RuntimeError("no memory for that")
        return whole(*args, **options)

    monkeypatch.setattr(Stage, "run_backward", failing)
    text = refusal(pipe, data(1, log=5))
    assert text.startswith(
        "step 1 has bad numbers: its loss is nan. Where they began could not be found: "
        "RuntimeError: no memory for that"
    )
    assert_same(dict(model.named_buffers()), before)
    assert all(gradient is None for _, gradient in pipe.named_gradients())


def test_a_batch_that_can_be_split_once_alone_has_its_names():
    def split(rows):
        return [{name: each[at : at + 2] for name, each in rows.pop().items()} for at in range(1)]

    batch = data()
    batch["y"][0] = math.nan
    pipe = make(stages=1, example=[data()], split_batch=split, num_microbatches=None)
    assert "They came in with the batch's tensor ['y']" in refusal(pipe, [batch])


@pytest.mark.parametrize("find_nan", [False, True])
@pytest.mark.parametrize(("stages", "schedule"), [(1, "1f1b"), (2, "zb-auto"), (4, "interleaved-1f1b")])
def test_a_step_that_is_skipped_leaves_nothing(stages, schedule, find_nan, caplog):
    pipes = [
        make(
            Fragile(norm=True),
            stages=stages,
            schedule=schedule,
            bad_numbers="skip",
            find_nan=find_nan,
            scheduler=halving,
        )
        for _ in range(2)
    ]
    told = []
    for at, pipe in enumerate(pipes):
        pipe.log_to(lambda step, numbers, at=at: told.append((at, step, numbers["loss"])))
        pipe.step(data(0))
    before = everything(pipes[0])
    for batch in (data(1, log=5), data(1, root=5)):
        with caplog.at_level(logging.WARNING, "evenflow"):
            result = pipes[0].step(batch)
        assert result.bad_numbers is not None
        assert f"left out: {result.bad_numbers}" in caplog.messages
        assert_same(everything(pipes[0]), before)
        assert all(gradient is None for _, gradient in pipes[0].named_gradients())
    assert pipes[0].state_dict()["step"] == 3
    for pipe in pipes:
        assert pipe.step(data(2)).bad_numbers is None
    assert_same(everything(pipes[0]), everything(pipes[1]))
    assert [each[1:] for each in told if each[0] == 0] == [each[1:] for each in told if each[0] == 1]


def test_after_a_stop_training_goes_on_as_if_there_had_been_no_such_step():
    pipes = [make(Fragile(0.3, norm=True), stages=2, schedule="zb-auto", scheduler=halving) for _ in range(2)]
    for pipe in pipes:
        pipe.step(data(0))
    for batch in (data(1, log=5), data(1, root=2)):
        refusal(pipes[0], batch)
    losses = [float(pipe.step(data(2)).loss) for pipe in pipes]
    assert losses[0] == losses[1]
    assert_same(pipes[0].state_dict(), pipes[1].state_dict())


def test_many_skips_in_a_row_are_an_error():
    pipe = make(stages=2, bad_numbers="skip")
    for _ in range(MOST_SKIPS - 1):
        pipe.step(data(log=0))
    pipe.step(data())
    for _ in range(MOST_SKIPS - 1):
        pipe.step(data(log=0))
    text = refusal(pipe, data(log=0))
    assert text.startswith(
        f"{MOST_SKIPS} steps in a row had bad numbers and were left out; the last one: step"
    )


def test_gradients_from_an_earlier_batch_are_told_as_such():
    pipe = make(stages=2)
    pipe.step(data(0, root=1), update=False)
    pipe.step(data(1), update=False)
    text = refusal(pipe, data(2))
    assert "This batch, run again, made none: the gradient of " in text
    assert "from one of the 2 batches accumulated before it (update=False)" in text
    pipe = make(stages=2, find_nan=True)
    assert "root:sqrt (SqrtBackward0)" in refusal(pipe, data(0, root=1), update=False)


def test_a_bad_loss_drops_what_was_accumulated():
    pipe, other = make(stages=2, bad_numbers="skip"), make(stages=2)
    pipe.step(data(0), update=False)
    assert "log:log made" in pipe.step(data(1, log=3), update=False).bad_numbers
    for each in (pipe, other):
        each.step(data(2), update=False)
        each.step(data(3))
    assert_same(weights(pipe), weights(other))


def test_without_a_policy_nobody_looks():
    pipe = make(stages=2, bad_numbers=None)
    result = pipe.step(data(log=5))
    assert math.isnan(float(result.loss))
    assert (result.grad_norm, result.bad_numbers) == (None, None)


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"bad_numbers='rollback' is none of 'stop', 'skip' and None"):
        make(bad_numbers="rollback")
    with pytest.raises(ConfigError, match="find_nan=1 must be True or False"):
        make(find_nan=1)


# -- several processes


MESHES = {
    "pipeline": {},
    "data": {"mesh": {"dp": 2}, "stages": 1},
    "zero1": {"mesh": {"dp": 2}, "stages": 1, "shard": "zero1"},
    "fsdp": {"mesh": {"dp": 2}, "stages": 1, "shard": "fsdp"},
}


def on_two_ranks():
    dist.init_process_group("gloo")
    return {name: on_a_mesh(options) for name, options in MESHES.items()}


def on_a_mesh(options):
    """Messages of steps that are bad in a row of the second data rank, and that the others are as without."""
    texts, numbers = [], []
    for bad in (True, False):
        pipe = make(Fragile(0.3, norm=True), schedule="zb-auto", **options)
        losses = [float(pipe.step(data(0)).loss)]
        for batch in (data(1, log=5), data(1, root=5), data(1) | {"y": torch.full((ROWS, 1), math.nan)}):
            texts += [refusal(pipe, batch)] if bad else []
        losses += [float(pipe.step(data(seed)).loss) for seed in (2, 3)]
        numbers.append(losses)
    pipe = make(Fragile(0.3), schedule="1f1b", find_nan=True, bad_numbers="skip", **options)
    watched = [pipe.step(batch).bad_numbers for batch in (data(0), data(1, log=5), data(1, root=5), data(2))]
    whole = all(is_finite(parameter) for _, parameter in pipe.named_parameters())
    return texts, numbers, watched, whole


@cache
def ranks():
    return evenflow.launch(on_two_ranks, nproc=2)


@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_tell_the_same_and_go_on(mesh):
    first, second = (rank[mesh] for rank in ranks())
    assert first == second
    texts, (with_bad, without), watched, whole = first
    assert with_bad == without
    assert whole
    rank = 0 if mesh == "pipeline" else 1
    forward = (
        rf"They began in the forward of microbatch 2 on stage 0 \(rank {rank}\): log:log made 8 bad of 16"
    )
    backward = (
        r"backward of microbatch 2 on stage \d \(rank 1\): root:sqrt \(SqrtBackward0\) made 8 bad of 16"
    )
    assert re.search(forward, texts[0])
    assert re.search(backward, texts[1])
    assert "They came in with the batch's tensor ['y'], 2 bad of 2 numbers (2 nan)" in texts[2]
    assert re.search(r"microbatch 0 on stage \d \(rank [01]\)", texts[2])
    assert watched[0] is watched[3] is None
    assert re.search(forward, watched[1])
    assert re.search(backward, watched[2])


# -- the command


def test_the_flags_of_train():
    example = "examples/gpt.py:build"
    assert make_job(Flags(source=example)).config.training.bad_numbers == "stop"
    training = make_job(Flags(source=example, bad_numbers="skip", find_nan=True)).config.training
    assert (training.bad_numbers, training.find_nan) == ("skip", True)
    with pytest.raises(ConfigError, match=r"find_nan looks for bad numbers, and training"):
        make_job(Flags(source=example, bad_numbers="ignore", find_nan=True))


MODEL = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.b(torch.log(self.a(x)))

def build():
    torch.manual_seed(0)
    return Model(), lambda model, batch: model(batch["x"]).mean(), {"x": torch.randn(8, 4)}
"""


def test_train_stops_with_the_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    with pytest.raises(SystemExit) as exited:
        main(["train", "model.py:build", "--device", "cpu", "--stages", "1", "--microbatches", "4"])
    assert exited.value.code == 2
    message = capsys.readouterr().err
    assert "error: rank 0: step 0 has bad numbers: its loss is nan. They began in the forward of" in message
    assert "log made" in message
