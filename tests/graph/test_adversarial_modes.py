"""Uses of a pipeline that recordings could mistake for one another: evaluation, gradient modes, memory."""

import copy

import torch
from adversaries import Net, data, net, square
from torch.nn import functional as F

import evenflow
from evenflow.runtime.recorded.microbatch import Microbatches
from unsplit import sgd


def straight(self, x):
    return self.head(self.c(self.b(self.a(x))))


def made(model, loss=square, **options):
    example = Microbatches(data(0))
    return evenflow.pipeline(model, loss=loss, example=example, stages=2, max_leaf_share=0.0, **options)


def plain_loss(model, items, loss=square):
    with torch.no_grad():
        return torch.stack([loss(model, item) * (1 / len(items)) for item in items]).sum()


def test_a_step_after_an_evaluation_of_a_model_in_evaluation_mode_trains():
    model = net(straight).eval()
    pipe = made(model)
    other = Microbatches(data(0, rows=4))
    pipe.evaluate(other)
    pipe.step(other)
    assert all(gradient is not None for _, gradient in pipe.named_gradients())


def test_an_evaluation_is_recorded_without_gradients():
    model = net(lambda self, x: straight(self, x) * (2 if torch.is_grad_enabled() else 1)).eval()
    assert torch.equal(made(model).evaluate(Microbatches(data(0))).loss, plain_loss(model, data(0)))


def test_a_step_without_gradients_is_refused_or_trains_everything():
    model = net(straight)
    pipe = made(model)
    try:
        with torch.no_grad():
            pipe.step(Microbatches(data(0)))
    except evenflow.EvenflowError:
        return
    assert all(gradient is not None for _, gradient in pipe.named_gradients())


def test_a_number_among_the_metrics_is_that_of_its_step():
    class Schedule:
        rate = 0.0

    now = Schedule()

    def loss(model, batch):
        return square(model, batch), {"rate": now.rate, "first": str(batch["x"][0, 0].item())}

    pipe = made(net(straight), loss)
    for step in range(2):
        now.rate = float(step)
        found = pipe.step(Microbatches(data(0))).metrics
        assert found["first"] == [str(item["x"][0, 0].item()) for item in data(0)]
        assert found["rate"] == now.rate


def test_the_memory_of_a_weight_may_be_replaced():
    model = net(straight)
    pipe = made(model)
    pipe.step(Microbatches(data(0)))
    model.a.weight.data = model.a.weight.data * 0.5
    assert torch.equal(pipe.step(Microbatches(data(1))).loss, plain_loss(model, data(1)))


def test_the_memory_of_a_shared_weight_may_be_replaced():
    model = net(straight)
    model.c.weight = model.a.weight
    pipe = made(model, split=["c"])
    pipe.step(Microbatches(data(0)))
    model.a.weight.data = model.a.weight.data * 0.5
    assert torch.equal(pipe.step(Microbatches(data(1))).loss, plain_loss(model, data(1)))


def test_a_prediction_sees_what_its_function_is_made_of():
    pipe = made(net(straight))
    scale = [1.0]

    def scaled(model, batch):
        return model(batch["x"]) * scale[0]

    before = pipe.predict(Microbatches(data(0)), scaled)
    scale[0] = 2.0
    assert torch.equal(pipe.predict(Microbatches(data(0)), scaled), before * 2)


def test_steps_and_evaluations_in_turn():
    model, plain = net(straight), net(straight)
    plain.load_state_dict(model.state_dict())
    pipe, optimizer = made(model, optimizer=sgd), sgd(plain.parameters())
    for step in range(3):
        items = data(step, rows=2 + step)
        assert torch.equal(pipe.evaluate(Microbatches(items)).loss, plain_loss(plain, items))
        optimizer.zero_grad()
        for item in copy.deepcopy(items):
            (F.mse_loss(plain(item["x"]), item["y"]) / len(items)).backward()
        optimizer.step()
        pipe.step(Microbatches(items))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_pipeline_leaves_the_model_as_it_was():
    model = net(straight)
    kept = {name: id(parameter) for name, parameter in model.named_parameters()}
    made(model).close()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == kept
    assert isinstance(model, Net)
