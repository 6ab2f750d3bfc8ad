"""`Pipeline.check`: equal where it must be, nothing is changed, and what differs is named."""

import contextvars
import itertools
import math
import random

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import evenflow
from evenflow.ir.op import Payload
from evenflow.pipe.faults.compare import compared, difference, leaves_compared
from evenflow.runtime.stages.stage import Stage
from small_models import MODELS, TIED, VOCABULARY, adamw, batches, build
from unsplit import copied, mean_square, mlp, regression, sgd

WIDTH = 8


def piped(model, *, loss=mean_square, example=None, **options):
    options = {"stages": 2, "num_microbatches": 4, "max_leaf_share": 0.0} | options
    return evenflow.pipeline(
        model, loss=loss, example=regression(8, WIDTH) if example is None else example, **options
    )


def rows(report, kind):
    return [row for row in report.rows if row.kind == kind]


# -- equal


@pytest.mark.parametrize(("name", "dropout"), [*((name, 0.2) for name in MODELS), ("gpt", 0.0)])
def test_models_equal_themselves_in_a_plain_loop(name, dropout):
    model, batch = build(name, dropout), batches()[0]
    pipe = evenflow.pipeline(model, example=batch, stages=3, num_microbatches=4)
    report = pipe.check(batch)
    assert report.equal, report
    assert {row.name for row in rows(report, "gradient")} == dict(model.named_parameters()).keys()
    assert {row.name for row in rows(report, "buffer")} == dict(model.named_buffers()).keys()
    inexact = [row.name for row in report.rows if row.difference > 0]
    assert set(inexact) <= {"shared.weight" if name == "t5" else "transformer.wte.weight"}
    assert bool(inexact) == (name in TIED)
    assert report.reference.endswith("its draws keyed alike") == (dropout > 0)
    assert report.verdict.startswith(
        "equal: bit for bit, but 1 gr" if inexact else "equal: everything, bit for bit"
    )


@pytest.mark.parametrize("name", TIED)
def test_with_exact_shared_parameters_have_the_bits_of_one_stage(name):
    batch = batches()[0]
    pipe = evenflow.pipeline(build(name, 0.2), example=batch, stages=3, num_microbatches=4, exact=True)
    report = pipe.check(batch)
    assert report.equal, report
    assert [row.difference for row in rows(report, "gradient (one stage)")] == [0.0]
    assert "shared parameters against one stage" in str(report)


@pytest.mark.parametrize("exact", [False, True])
def test_under_autocast_shared_gradients_agree_to_the_last_bits_of_its_type(exact):
    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(model(batch["x"]).float(), batch["y"])

    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(layer, nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 1))
    report = piped(model, loss=loss, split=["1"], exact=exact).check(regression(8, WIDTH))
    assert report.equal, report
    shared = [row for row in rows(report, "gradient") if row.difference > 0]
    assert [row.name for row in shared] == ["0.weight", "0.bias"]
    assert all(1e-6 < row.difference < row.allowed == 4 * torch.finfo(torch.bfloat16).eps for row in shared)
    assert [row.difference for row in rows(report, "gradient (one stage)")] == [0.0] * 2 * exact


class Checkpointed(nn.Sequential):
    """Computes each of its parts again in the backward."""

    def forward(self, x):
        for part in self:
            x = checkpoint(part, x, use_reentrant=False)
        return x


def test_dropout_inside_gradient_checkpoints_is_drawn_alike():
    def block():
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5))

    torch.manual_seed(0)
    model = nn.Sequential(Checkpointed(block(), block(), block()), nn.Linear(WIDTH, 1))
    report = piped(model).check(regression(8, WIDTH))
    assert report.equal, report
    assert report.reference.endswith("its draws keyed alike")


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "interleaved-1f1b", "dualpipe-v"])
def test_every_kind_of_schedule_is_equal(schedule):
    batch = batches()[0]
    pipe = evenflow.pipeline(
        build("gpt", 0.1), example=batch, stages=4, num_microbatches=8, schedule=schedule
    )
    assert pipe.check(batch).equal


class Drawing(nn.Module):
    """Draws itself and in modules, before, between and after; and once more in a second call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        x = F.dropout(x, 0.2, self.training)
        h = self.dropout(self.first(x)) + torch.randn_like(x)
        return self.dropout(self.second(h)) * torch.bernoulli(torch.full_like(x, 0.5)) + torch.rand(WIDTH)


class DrawingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Drawing() for _ in range(2))
        self.recurrent = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x, _ = self.recurrent(x[:, None])
        return self.head(F.alpha_dropout(x[:, 0], 0.1, self.training))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_whole_model_draws_what_the_split_one_draws(share):
    def loss(model, batch):
        noise = torch.rand(())  # by the loss function itself, before and after the model's own draws
        return mean_square(model, batch) * (1 + noise + torch.rand(()))

    pipe = piped(DrawingModel(), loss=loss, max_leaf_share=share)
    for _ in range(2):
        report = pipe.check(regression(8, WIDTH))
        assert report.equal, report
        pipe.step(regression(8, WIDTH))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_hook_that_draws_draws_as_a_part_of_its_module(share):
    model = mlp(4, WIDTH, WIDTH, 1)
    model[0].register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
    model[2].register_forward_pre_hook(lambda module, args: args[0] * torch.rand_like(args[0]))
    report = piped(model, example=regression(), max_leaf_share=share).check(regression())
    assert report.equal, report


def test_microbatches_of_two_kinds_and_unequal_weights():
    pipe = piped(mlp(WIDTH, 8, 8, 1), num_microbatches=None, microbatch_size=3, example=regression(8, WIDTH))
    report = pipe.check(regression(8, WIDTH))
    assert report.equal
    assert report.num_microbatches == 3


def test_a_batch_of_another_shape_is_recorded_and_checked():
    pipe = piped(mlp(WIDTH, 8, 8, 1))
    assert pipe.check(regression(12, WIDTH)).equal


@pytest.mark.parametrize("before", ["1", "3"])
def test_a_parameter_in_two_layers(before):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 1))
    model[2].weight = model[0].weight
    report = piped(model, split=[before]).check(regression(8, WIDTH))
    assert report.equal, report
    # The plain loop adds up once, the split once for each stage.
    inexact = [row.name for row in report.rows if row.difference > 0]
    assert inexact == (["0.weight"] if before == "1" else [])


# -- nothing is changed


class Stateful(nn.Module):
    """Keeps a count, a list, running statistics, a buffer that it replaces, and a generator of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1)
        self.count, self.seen = 0, []
        self.generator = torch.Generator().manual_seed(0)
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x):
        self.count += 1
        self.seen.append(self.count)
        x = self.dropout(self.norm(self.layer(x)))
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x * (1 + 0.1 * self.count) + self.average + torch.randn(x.shape, generator=self.generator)


def state_of(pipe, model):
    """Everything that a check must leave alone, as values that can be compared."""
    updater = pipe._parts.updater
    generators = [module.generator.get_state() for module in model.modules() if isinstance(module, Stateful)]
    kept = [(m.count, list(m.seen), m.average) for m in model.modules() if isinstance(m, Stateful)]
    return [
        [parameter.detach().clone() for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        [copied(optimizer.state_dict()) for optimizer in updater.optimizers.values()],
        [module.training for module in model.modules()],
        [torch.get_rng_state(), *generators],
        random.getstate(),
        repr(np.random.get_state()),
        copied(kept),
        pipe._step,
    ]


def assert_same_state(found, expected):
    mine, theirs = (torch.utils._pytree.tree_flatten(each) for each in (found, expected))
    assert mine[1] == theirs[1]
    for one, other in zip(mine[0], theirs[0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def stateful_model():
    torch.manual_seed(0)
    return nn.Sequential(Stateful(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), Stateful(), nn.Linear(WIDTH, 1))


@pytest.mark.parametrize("breaks", [False, True])
def test_everything_is_as_it_was(breaks, monkeypatch):
    """Also where the runs differ, so that the node is looked for; with gradients accumulated meanwhile."""
    model = stateful_model()
    model[1].bias.requires_grad_(False)
    pipe = piped(model, optimizer=adamw)
    batch = regression(8, WIDTH)
    pipe.step(batch)
    pipe.step(batch, update=False)
    before, given, spans = state_of(pipe, model), copied(batch), pipe.timelines()
    if breaks:
        break_node(pipe, "1")
    report = pipe.check(batch)
    assert report.equal != breaks, report
    assert_same_state(state_of(pipe, model), before)
    assert_same_state(batch, given)
    assert pipe.timelines() == spans


def test_training_goes_on_as_if_there_had_been_no_check():
    weights = []
    for checks in (False, True):
        model = stateful_model()
        pipe = piped(model, optimizer=sgd)
        for update in (True, False, True, True):
            if checks:
                assert pipe.check(regression(8, WIDTH)).equal
            pipe.step(regression(8, WIDTH), update=update)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_an_error_in_the_middle_leaves_everything_as_it_was():
    model = stateful_model()
    fails = False

    class Failing:
        def __call__(self, model, batch):
            if fails:
                random.random()
                np.random.random()
                raise ValueError("no")
            return mean_square(model, batch)

    pipe = piped(model, loss=Failing(), optimizer=sgd)
    pipe.step(regression(8, WIDTH))
    before = state_of(pipe, model)
    fails = True
    with pytest.raises(ValueError, match="no"):
        pipe.check(regression(8, WIDTH))
    assert_same_state(state_of(pipe, model), before)


def test_a_program_that_changes_its_batch_leaves_the_users_alone():
    def loss(model, batch):
        batch["x"].mul_(2)
        return mean_square(model, batch)

    batch = regression(8, WIDTH)
    given = copied(batch)
    assert piped(mlp(WIDTH, 8, 8, 1), loss=loss).check(batch).equal
    assert_same_state(batch, given)


def test_evaluation_mode_and_no_grad_are_left_as_they_are():
    model = DrawingModel().eval()
    pipe = piped(model)
    with torch.no_grad():
        assert pipe.check(regression(8, WIDTH)).equal
    assert not any(module.training for module in model.modules())


# -- what differs is named


def calls_of(pipe, name):
    """(recording, function) of each node of this name, in all recordings."""
    return [(at, call.function) for at, _, call in places_of(pipe) if call.node.name == name]


def places_of(pipe):
    for at, recording in enumerate(pipe._parts.recordings.entries):
        for work in recording.works.values():
            yield from ((at, run, call) for run in work.runs for call in run.calls)


def replace_call(pipe, name, function, recording=0):
    """Let a node of the split call another function."""
    for at, run, call in places_of(pipe):
        if (at, call.node.name) == (recording, name):
            call.function = function
            vars(run).pop("plainly", None)  # its code names the function


def break_node(pipe, name):
    """Let one node of the split add 1e-3 to all that it makes."""
    ((_, right),) = calls_of(pipe, name)
    replace_call(pipe, name, lambda *args, **kwargs: right(*args, **kwargs) + 1e-3)


@pytest.mark.parametrize(("name", "stage"), [("0", 0), ("1", 0), ("3", 1), ("4", 1)])
def test_the_first_node_that_differs_is_named(name, stage):
    pipe = piped(mlp(WIDTH, 8, 8, 1), split=["2"])
    break_node(pipe, name)
    report = pipe.check(regression(8, WIDTH))
    assert not report.equal
    assert (report.first_node.node, report.first_node.stage) == (name, stage)
    assert report.first_node.microbatch == 0
    assert 1e-4 < report.first_node.difference < 1e-1
    assert f"the first node that differs: {name} (stage {stage}, microbatch 0): by " in str(report)


def test_a_node_is_named_where_the_model_draws_and_in_a_recording_of_its_own():
    pipe = piped(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)),
        num_microbatches=None,
        microbatch_size=3,
    )
    pipe.check(regression(8, WIDTH))  # learns the recording of the last, shorter microbatch
    (_, (last, right)) = calls_of(pipe, "2")
    replace_call(pipe, "2", lambda *args: right(*args) + 1e-3, recording=last)
    report = pipe.check(regression(8, WIDTH))
    assert (report.first_node.node, report.first_node.microbatch) == ("2", 2)


def test_a_node_after_running_statistics_is_named():
    """What a node makes in a later microbatch depends on the buffers that the earlier ones left."""
    pipe = piped(stateful_model())
    ((_, right),), numbers = calls_of(pipe, "4"), itertools.cycle(range(4))
    replace_call(pipe, "4", lambda *args: right(*args) + 1e-3 * (next(numbers) == 2))
    report = pipe.check(regression(8, WIDTH))
    assert (report.first_node.node, report.first_node.microbatch) == ("4", 2)


@pytest.mark.parametrize("payload", list(Payload))
def test_a_wrong_relay_is_found_where_it_arrives(payload, monkeypatch):
    right = Stage.outgoing

    def wrong(self, flight, target, kind):
        parcel = right(self, flight, target, kind)
        return tuple(tensor + 1e-3 for tensor in parcel) if kind is payload else parcel

    monkeypatch.setattr(Stage, "outgoing", wrong)
    report = piped(mlp(WIDTH, 8, 8, 1), split=["2"]).check(regression(8, WIDTH))
    assert not report.equal
    if payload is Payload.ACTIVATION:
        assert (report.first_node.node, report.first_node.stage) == ("2", 1)
    else:
        assert report.first_node is None
        assert "forward, every node made the same" in report.verdict
        # Autograd reaches the tanh's input, and so the first layer, through what stage 1 sent.
        assert {row.name for row in report.rows if not row.fits} == {"0.weight", "0.bias"}
        first = report.first_gradient
        assert (first.node, first.stage) == ("0", 0)
        assert first.parameter in ("0.weight", "0.bias")


def test_the_first_gradient_is_the_first_in_backward_order():
    pipe = piped(mlp(WIDTH, 8, 8, 8, 1), split=["2", "4"], stages=3)
    model = pipe._parts.model
    handle = model[2].weight.register_hook(lambda gradient: gradient * 1.5)
    other = model[4].bias.register_hook(lambda gradient: gradient)
    pipe.check(regression(8, WIDTH))
    ((_, right),) = calls_of(pipe, "4")

    def doubled(x):
        made = right(x)
        if made.requires_grad:
            made.register_hook(lambda gradient: gradient * 2)
        return made

    replace_call(pipe, "4", doubled)
    report = pipe.check(regression(8, WIDTH))
    assert report.first_node is None
    assert (report.first_gradient.node, report.first_gradient.stage) == ("4", 2)
    wrong = {row.name for row in report.rows if not row.fits}
    assert wrong == {f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    handle.remove()
    other.remove()


NOW = contextvars.ContextVar("now", default=1.5)
RUNS = contextvars.ContextVar("runs", default=False)


class Clock:
    """A number that no recording can see, in a context variable. It stands still until it is started."""

    def __init__(self):
        NOW.set(1.5)
        RUNS.set(False)

    def start(self):
        RUNS.set(True)

    def tick(self):
        if RUNS.get():
            NOW.set(NOW.get() + 0.5)
        return NOW.get()


def checked(clock, loss):
    pipe = piped(mlp(WIDTH, 8, 8, 1), loss=loss)
    clock.start()
    return pipe.check(regression(8, WIDTH))


def test_a_number_that_changes_by_itself_is_named():
    clock = Clock()

    def loss(model, batch):
        return (model(batch["x"]) * clock.tick() - batch["y"]).square().mean()

    report = checked(clock, loss)
    assert not report.equal
    assert report.first_node.node == "mul"
    assert report.first_node.stage == 1
    assert "it was recorded with 1.5 and is called with 4.0 now" in str(report)


def test_other_calls_than_the_recorded_ones_are_named():
    clock = Clock()

    def loss(model, batch):
        made = model(batch["x"])
        made = made.relu() if clock.tick() > 2 else made.sigmoid()
        return (made - batch["y"]).square().mean()

    report = checked(clock, loss)
    assert report.first_node.node == "sigmoid"
    assert "the whole model ran relu in its place" in report.verdict


def test_what_cannot_be_recorded_again_is_said():
    clock = Clock()

    def loss(model, batch):
        made = model(batch["x"])
        if clock.tick() > 2 and made.sum() > 1e9:
            made = made + 1
        return (made * NOW.get() - batch["y"]).square().mean()

    report = checked(clock, loss)
    assert report.first_node is None
    assert "no node can be named, because the model cannot be recorded any more" in report.verdict


def test_a_difference_that_does_not_come_from_a_node_is_said():
    clock = Clock()

    def loss(model, batch):
        return mean_square(model, batch), {"time": clock.tick()}

    report = checked(clock, loss)
    (wrong,) = (row for row in report.rows if not row.fits)
    assert (wrong.kind, wrong.name, wrong.note) == ("output", "['time']", "1.5 against 3.5")
    assert report.first_node is None
    assert "run again, every node made the same" in report.verdict


def test_outputs_are_compared_with_their_types():
    clock = Clock()

    def loss(model, batch):
        made = model(batch["x"])
        kind = float if clock.tick() < 2 else int
        metrics = {"made": made, "kind": kind(3), "always": [None, "text", made.sum()]}
        return (made - batch["y"]).square().mean(), metrics

    report = checked(clock, loss)
    notes = {row.name: (row.fits, row.note) for row in rows(report, "output")}
    assert notes == {
        "['made']": (True, ""),
        "['kind']": (False, "float against int"),
        "['always'][0]": (True, ""),
        "['always'][1]": (True, ""),
        "['always'][2]": (True, ""),
    }


def test_a_loss_that_becomes_a_number_is_refused():
    clock = Clock()

    def loss(model, batch):
        made = mean_square(model, batch)
        return made if clock.tick() < 2 else 1.0

    with pytest.raises(
        evenflow.ConfigError, match="returned a float for microbatch 0, where it returned a tensor"
    ):
        checked(clock, loss)


def test_there_must_be_a_batch():
    with pytest.raises(evenflow.ConfigError, match="there is no batch to check"):
        piped(mlp(WIDTH, 8, 8, 1)).check(None)


def test_progress_is_told_what_begins():
    told = []
    pipe = piped(mlp(WIDTH, 8, 8, 1))
    pipe.check(regression(8, WIDTH), progress=told.append)
    assert told == ["one step, split", "one step, whole"]
    break_node(pipe, "0")
    pipe.check(regression(8, WIDTH), progress=told.append)
    assert told[4:] == ["looking for the first node that differs"]


# -- comparing


def test_numbers_that_are_no_numbers():
    nan, inf = math.nan, math.inf
    tensor = torch.tensor
    assert difference(tensor([nan, inf, -0.0]), tensor([nan, inf, 0.0])) == 0
    assert difference(tensor([nan, 1.0]), tensor([2.0, 1.0])) == inf
    assert difference(tensor([1.0]), tensor([0.0])) == inf
    assert difference(tensor([True, False]), tensor([True, True])) == 1
    assert difference(tensor([2**60 + 1]), tensor([2**60])) > 0
    assert difference(tensor([]), tensor([])) == 0
    assert difference(tensor([1 + 1j]), tensor([1 + 2j])) == pytest.approx(1 / 5**0.5)
    assert difference(tensor([1.0, 0.0]).to_sparse(), tensor([1.0, 0.5]).to_sparse()) == 0.5


def test_a_tensor_is_not_a_number_and_one_type_not_another():
    one = torch.ones(())
    assert compared(one, 1.0) == (math.inf, "Tensor against float")
    assert compared(None, one) == (math.inf, "nothing against Tensor")
    assert compared(one, one.double()) == (math.inf, "float32[] against float64[]")
    assert compared(math.nan, math.nan) == (0.0, "")
    assert compared(2.0, 1.0) == (1.0, "2.0 against 1.0")
    assert compared("a", "b") == (math.inf, "'a' against 'b'")
    assert compared(object(), object()) == (0.0, "")
    assert list(leaves_compared([1], [1, 2])) == [("", math.inf, "list against list of another form")]


# -- what a cut sends


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stages", [2, 4])
def test_each_cut_of_a_decoder_sends_one_hidden_state(stages, padded):
    """Mask and positions are made inside, and made again on each stage that needs them."""
    batch = batches()[0]
    if padded:
        mask = torch.ones_like(batch["input_ids"])
        mask[::3, -2:] = 0
        batch = {**batch, "attention_mask": mask}
    pipe = evenflow.pipeline(llama(), example=batch, stages=stages, num_microbatches=4)
    cut = pipe._parts.recordings.entries[0].cut
    rows_, length, width = 2, 8, 32
    for section in cut.sections[:-1]:
        ((target, values),) = section.sends.items()
        assert target == section.stage + 1
        (value,) = values
        assert cut.graph.values[value].info.shape == (rows_, length, width)
    assert [(stage.num_sent, stage.sends_bytes) for stage in pipe.cut] == [
        *[(1, 4 * rows_ * length * width)] * (stages - 1),
        (0, 0),
    ]
    assert pipe.check(batch).equal


def test_a_value_that_two_stages_use_is_sent_twice():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            first = self.layers[0](x)
            second = self.layers[1](first)
            return self.layers[2](second) + first

    pipe = piped(Skip(), loss=lambda model, b: model(b["x"]).mean(), split=["layers.1", "layers.2"], stages=3)
    size = 2 * WIDTH * 4
    assert [(s.num_sent, s.sends_bytes) for s in pipe.cut] == [(2, 2 * size), (1, size), (0, 0)]
    assert pipe.check(regression(8, WIDTH)).equal
