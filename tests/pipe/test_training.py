"""`Pipeline`: steps, accumulation, evaluation, names, checkpoints, in one process."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.checkpoint.load import open_checkpoint
from evenflow.runtime.recorded.microbatch import Microbatches, split
from small_models import load_example
from unsplit import (
    assert_same_step,
    mean_square,
    mlp,
    pipeline_step,
    plain_step,
    regression,
    saved_model,
    seeded,
    sgd,
)


def make(model=None, **options):
    model = mlp(4, 8, 8, 8, 1) if model is None else model
    options = {"loss": mean_square, "example": regression(), "stages": 2, "max_leaf_share": 0.0} | options
    return evenflow.pipeline(model, **options)


def plain(items, shares, model=None):
    """Loss and gradients of a plain loop that weighs the microbatches."""
    model = mlp(4, 8, 8, 8, 1) if model is None else model
    losses = []
    for item, share in zip(items, shares, strict=True):
        loss = mean_square(model, item)
        loss.backward(torch.tensor(share))
        losses.append(loss.detach() * share)
    return torch.stack(losses).sum(), {name: p.grad for name, p in model.named_parameters()}


def rows(batch, *bounds):
    return [{k: t[a:b] for k, t in batch.items()} for a, b in itertools.pairwise(bounds)]


def assert_gradients(pipe, expected, **close):
    found = dict(pipe.named_gradients())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if close:
            torch.testing.assert_close(found[name], gradient, **close)
        else:
            assert torch.equal(found[name], gradient), name


# -- sizes


def test_an_uneven_last_microbatch():
    pipe = make(microbatch_size=3)
    loss = pipe.step(regression()).loss
    expected, gradients = plain(rows(regression(), 0, 3, 6, 8), [3 / 8, 3 / 8, 2 / 8])
    assert torch.equal(loss, expected)
    assert_gradients(pipe, gradients)
    whole = mlp(4, 8, 8, 8, 1)
    mean_square(whole, regression()).backward()
    assert_gradients(pipe, {n: p.grad for n, p in whole.named_parameters()}, rtol=1e-5, atol=1e-6)


def test_num_microbatches_and_microbatch_size_are_two_ways_to_say_it():
    first, second = make(num_microbatches=4), make(microbatch_size=2)
    assert torch.equal(first.step(regression()).loss, second.step(regression()).loss)
    assert_gradients(first, dict(second.named_gradients()))


def test_a_list_of_microbatches():
    items = rows(regression(), 0, 5, 8)
    pipe = make(example=Microbatches(items))
    loss = pipe.step(Microbatches(items)).loss
    expected, gradients = plain(items, [5 / 8, 3 / 8])
    assert torch.equal(loss, expected)
    assert_gradients(pipe, gradients)


def test_split_batch():
    def pairs(batch):
        return [{k: t[i::2] for k, t in batch.items()} for i in range(2)]

    pipe = make(split_batch=pairs)
    loss = pipe.step(regression()).loss
    expected, gradients = plain(pairs(regression()), [0.5, 0.5])
    assert torch.equal(loss, expected)
    assert_gradients(pipe, gradients)


def test_batches_of_several_sizes_one_after_the_other():
    pipe = make(num_microbatches=2)
    for size in (8, 4, 2, 8):
        loss = pipe.step(regression(size)).loss
        expected, gradients = plain(rows(regression(size), 0, size // 2, size), [0.5, 0.5])
        assert torch.equal(loss, expected)
        assert_gradients(pipe, gradients)


@pytest.mark.parametrize("form", ["dict", "tuple", "list", "tensor", "nested"])
def test_batches_of_several_forms(form):
    x, y = regression()["x"], regression()["y"]
    batch, pick = {
        "dict": ({"x": x, "y": y, "name": "n", "scale": 2.0}, lambda b: (b["x"], b["y"])),
        "tuple": ((x, y, None), lambda b: b[:2]),
        "list": ([x, y, 3], lambda b: b[:2]),
        "tensor": (torch.cat([x, y], 1), lambda b: (b[:, :4], b[:, 4:])),
        "nested": ({"in": [x, {"a": torch.tensor(1.0)}], "out": (y,)}, lambda b: (b["in"][0], b["out"][0])),
    }[form]

    def loss(model, microbatch):
        given, wanted = pick(microbatch)
        return F.mse_loss(model(given), wanted)

    model = mlp(4, 8, 8, 8, 1)
    pipe = make(model, example=batch, num_microbatches=2, loss=loss)
    expected = plain_step(mlp(4, 8, 8, 8, 1), loss, split(batch, 2))
    assert_same_step(pipeline_step(pipe, model, batch), expected)


# -- results


def test_metrics_are_joined():
    def loss(model, batch):
        prediction = model(batch["x"])
        metrics = {"prediction": prediction, "mean": prediction.mean(), "rows": len(prediction), "kind": "a"}
        return F.mse_loss(prediction, batch["y"]), metrics

    model = mlp(4, 8, 8, 8, 1)
    metrics = make(model, loss=loss, microbatch_size=3).step(regression()).metrics
    assert metrics["rows"] == 8
    assert metrics["kind"] == "a"
    with torch.no_grad():
        torch.testing.assert_close(metrics["prediction"], model(regression()["x"]))
        torch.testing.assert_close(metrics["mean"], model(regression()["x"]).mean())
    assert not metrics["prediction"].requires_grad


def test_one_microbatch_returns_metrics_as_they_were_returned():
    def loss(model, batch):
        prediction = model(batch["x"])
        return F.mse_loss(prediction, batch["y"]), {"list": [prediction.sum(), ("x", 3)], "none": None}

    metrics = make(loss=loss, num_microbatches=1).step(regression()).metrics
    assert metrics["none"] is None
    assert metrics["list"][1] == ("x", 3)
    assert metrics["list"][0].shape == ()


def test_no_metrics_are_none():
    assert make().step(regression()).metrics is None


def test_a_result_shows_its_loss():
    result = make().step(regression())
    assert repr(result) == f"StepResult(loss={float(result.loss):.6g}, metrics=None)"
    assert not result.loss.requires_grad


# -- updates


def test_updates_are_those_of_the_optimizer():
    model, twin = mlp(4, 8, 8, 8, 1), mlp(4, 8, 8, 8, 1)
    pipe = make(model, optimizer=sgd, num_microbatches=1)
    updates = sgd(twin.parameters())
    for _ in range(3):
        pipe.step(regression())
        updates.zero_grad()
        mean_square(twin, regression()).backward()
        updates.step()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("sizes", [(8, 8), (8, 4), (4, 8, 2), (8,)])
def test_accumulated_steps_are_the_mean_over_all_rows(sizes):
    pipe = make(optimizer=sgd, num_microbatches=2)
    for _ in range(2):  # and the next accumulation begins from nothing
        before = {name: p.detach().clone() for name, p in pipe.named_parameters()}
        twin = mlp(4, 8, 8, 8, 1)
        twin.load_state_dict(before)
        for number, size in enumerate(sizes, start=1):
            pipe.step(regression(size), update=number == len(sizes))
        everything = {k: torch.cat([regression(size)[k] for size in sizes]) for k in ("x", "y")}
        mean_square(twin, everything).backward()
        expected = {name: p.grad for name, p in twin.named_parameters()}
        assert_gradients(pipe, expected, rtol=1e-5, atol=1e-6)
        sgd(twin.parameters()).step()
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter, dict(twin.named_parameters())[name], rtol=1e-5, atol=1e-6)


def test_gradients_of_an_accumulation_can_be_read_before_the_update():
    pipe = make(optimizer=sgd, num_microbatches=2)
    pipe.step(regression(8), update=False)
    pipe.step(regression(4), update=False)
    read = dict(pipe.named_gradients())
    assert_gradients(pipe, read)  # reading changes nothing
    pipe.step(regression(8), update=True)
    twin = mlp(4, 8, 8, 8, 1)
    everything = {k: torch.cat([regression(size)[k] for size in (8, 4, 8)]) for k in ("x", "y")}
    mean_square(twin, everything).backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert_gradients(pipe, expected, rtol=1e-5, atol=1e-6)


def test_reading_gradients_within_an_accumulation_of_a_shared_parameter_changes_nothing():
    def build():
        model = mlp(4, 4, 4, 4, 1)
        model[4].weight = model[0].weight
        return model

    def run(reads):
        pipe = make(build(), num_microbatches=2, split=["4"], optimizer=sgd)
        for _ in range(2):
            pipe.step(regression(), update=False)
            if reads:
                dict(pipe.named_gradients())
        pipe.step(regression())
        return dict(pipe.named_gradients())

    expected, found = run(reads=False), run(reads=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-8)


def test_without_an_optimizer_gradients_are_left_for_the_user():
    model = mlp(4, 8, 8, 8, 1)
    pipe = make(model, num_microbatches=1)
    before = [p.detach().clone() for p in model.parameters()]
    pipe.step(regression())
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert_same_step(
        pipeline_step(pipe, model, regression()),
        plain_step(mlp(4, 8, 8, 8, 1), mean_square, [regression()]),
    )


def test_the_scheduler_is_stepped_once_for_each_update():
    rates = []

    def halving(optimizer):
        rates.append(optimizer.param_groups[0])
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    pipe = make(optimizer=sgd, scheduler=halving)
    assert len(rates) == 2, "one for each stage"
    pipe.step(regression(), update=False)
    assert [group["lr"] for group in rates] == [0.1, 0.1]
    pipe.step(regression())
    pipe.step(regression())
    assert [group["lr"] for group in rates] == [0.025, 0.025]


def test_a_stage_without_anything_to_train_gets_no_optimizer():
    model = mlp(4, 8, 8, 8, 1)
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    given = []

    def optimizer(parameters):
        given.append([name for name, _ in parameters])
        return sgd(parameters)

    before = model[0].weight.clone()
    pipe = make(model, split=["4"], optimizer=optimizer)
    assert given == [["4.weight", "4.bias", "6.weight", "6.bias"]]
    pipe.step(regression())
    assert torch.equal(model[0].weight, before)
    assert [name for name, _ in pipe.named_gradients()] == given[0]


def test_names_are_the_models_own():
    model = mlp(4, 8, 8, 8, 1)
    model[2].weight.requires_grad_(False)
    pipe = make(model)
    pipe.step(regression())
    parameters = dict(pipe.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in pipe.named_gradients()} == trainable


def test_a_parameter_that_nothing_uses_has_no_gradient():
    model = mlp(4, 8, 8, 8, 1)
    model.unused = nn.Linear(2, 2)
    pipe = make(model, optimizer=sgd, loss=lambda m, b: mean_square(nn.Sequential.forward.__get__(m[:7]), b))
    pipe.step(regression())
    gradients = dict(pipe.named_gradients())
    assert gradients["unused.weight"] is None
    assert gradients["0.weight"] is not None


def test_is_main():
    assert make().is_main


def test_the_cut_is_told():
    pipe = make(split=["4"])
    first, second = pipe.cut
    assert (first.stage, first.num_nodes, first.first, first.last) == (0, 4, "0", "3")
    assert (second.stage, second.num_nodes, second.first, second.last) == (1, 4, "4", "mse_loss")
    assert first.num_parameters + second.num_parameters == sum(
        p.numel() for p in mlp(4, 8, 8, 8, 1).parameters()
    )
    assert first.share + second.share == pytest.approx(1)


# -- evaluation


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(4, 8, 8, 8, 1)
        self.layers.insert(2, nn.Dropout(0.5))
        self.layers.insert(3, nn.BatchNorm1d(8))

    def forward(self, x):
        return self.layers(x)


def test_evaluate_changes_the_buffers_that_the_model_itself_changes():
    class Counting(torch.nn.Linear):
        def forward(self, x):
            self.seen += x.sum()
            return super().forward(x) + self.seen

    def build():
        model = mlp(4, 8, 1).append(Counting(1, 1))
        model[-1].register_buffer("seen", torch.zeros(()))
        return model

    twin, model = build(), build()
    model.load_state_dict(twin.state_dict())
    pipe = make(model, stages=2, num_microbatches=2, max_leaf_share=0.0)
    for _ in range(2):
        loss = pipe.evaluate(regression()).loss
        with torch.no_grad():
            expected = [mean_square(twin.eval(), part) for part in split(regression(), 2)]
        assert torch.equal(loss, torch.stack([part / 2 for part in expected]).sum())
        assert torch.equal(model[-1].seen, twin[-1].seen)
        assert model.training


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_evaluate_is_the_model_in_evaluation_mode(stages):
    model = seeded(Noisy)()
    model.layers[3].eval()  # the user froze it: that must be so again afterwards
    pipe = make(model, optimizer=sgd, stages=stages, num_microbatches=2)
    pipe.step(regression())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: gradient.clone() for name, gradient in pipe.named_gradients()}
    found = pipe.evaluate(regression())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(g, gradients[name]) for name, g in pipe.named_gradients())
    flags = {name: module.training for name, module in model.named_modules()}
    assert not flags.pop("layers.3")
    assert all(flags.values())
    with torch.no_grad():
        parts = [mean_square(model.eval(), item) / 2 for item in rows(regression(), 0, 4, 8)]
    assert torch.equal(found.loss, sum(parts))


def test_evaluate_returns_metrics_and_takes_other_sizes():
    pipe = make(
        loss=lambda m, b: (mean_square(m, b), {"rows": len(b["x"])}), num_microbatches=2, optimizer=sgd
    )
    pipe.step(regression())
    assert pipe.evaluate(regression(6)).metrics == {"rows": 6}


def test_evaluate_within_an_accumulation_changes_nothing():
    def run(evaluates):
        pipe = make(seeded(Noisy)(), optimizer=sgd, num_microbatches=2)
        pipe.step(regression(), update=False)
        if evaluates:
            pipe.evaluate(regression(4))
        pipe.step(regression(4))
        return dict(pipe.named_gradients())

    expected, found = run(evaluates=False), run(evaluates=True)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_predict():
    model = seeded(Noisy)()
    pipe = make(model, num_microbatches=2, optimizer=sgd)
    pipe.step(regression())
    with torch.no_grad():
        expected = model.eval()(regression()["x"])
    model.train()
    torch.testing.assert_close(pipe.predict(regression()["x"]), expected)
    torch.testing.assert_close(pipe.predict({"x": regression()["x"]}), expected)
    named = pipe.predict(regression(), lambda m, b: {"p": m(b["x"]), "rows": len(b["x"])})
    torch.testing.assert_close(named["p"], expected)
    assert named["rows"] == 8
    assert model.training
    assert not named["p"].requires_grad


def test_predict_with_a_function_made_anew_each_time_is_recorded_once():
    pipe = make()
    for _ in range(3):
        pipe.predict(regression(), lambda m, b: m(b["x"]))
    assert len(pipe._parts.recordings.entries) == 2


def test_an_error_in_evaluation_leaves_the_model_training():
    model = seeded(Noisy)()
    pipe = make(model, num_microbatches=2)

    def failing(model, batch):
        raise ZeroDivisionError("in the function")

    with pytest.raises(ZeroDivisionError, match="in the function"):
        pipe.predict(regression(), failing)
    assert all(module.training for module in model.modules())
    pipe.step(regression())


# -- feeding and saving


def test_feed_yields_the_loader():
    batches = [regression(8), regression(4)]
    assert [batch is given for batch, given in zip(make().feed(batches), batches, strict=True)] == [
        True,
        True,
    ]


def test_save_replaces_a_folder(tmp_path):
    model = mlp(4, 8, 8, 8, 1)
    pipe = make(model, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
    for _ in range(2):
        pipe.step(regression())
        pipe.save(tmp_path / "checkpoint")  # the second replaces the first
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    saved = saved_model(tmp_path / "checkpoint")
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    assert open_checkpoint(tmp_path / "checkpoint").manifest.step == 2


def test_timelines():
    pipe = make(num_microbatches=2)
    for _ in range(2):
        pipe.step(regression())
    predicted, measured = pipe.timelines()
    for timeline in (predicted, measured):
        ops = [str(span.op) for span in timeline.spans if span.is_compute]
        assert sorted(ops) == sorted(f"{s}{kind}{m}" for s in range(2) for kind in "FB" for m in range(2))
        assert min(span.start_seconds for span in timeline.spans if span.is_compute) == pytest.approx(0)


# -- the textbook loss


def test_a_model_that_computes_its_own_loss():
    example = load_example("gpt")
    model, _, batch = example.build(batch_size=4, length=8, num_layers=2, width=32)
    pipe = evenflow.pipeline(model, example=batch, stages=2, optimizer=sgd)
    losses = [float(pipe.step(batch).loss) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_a_step_under_no_grad_trains_every_stage():
    weights = []
    for enabled in (True, False):
        model = mlp(4, 8, 8, 1)
        pipe = evenflow.pipeline(
            model, loss=mean_square, example=regression(), optimizer=sgd, stages=2, num_microbatches=2
        )
        with torch.set_grad_enabled(enabled):
            pipe.step(regression())
        weights.append(list(model.parameters()))
    assert all(map(torch.equal, *weights))


def test_the_example_is_let_go_of():
    example = torch.ones(8, 4)
    seen = weakref.ref(example)
    model, loss = nn.Linear(4, 1), lambda model, batch: model(batch).mean()
    pipe = evenflow.pipeline(model, loss=loss, example=example, stages=1)
    del example
    gc.collect()
    assert seen() is None
    pipe.step(torch.ones(8, 4))
