"""Training comforts, in one process and on two: metrics, predictions, hooks, averages, several models.

Each case of `comforts_cases` runs once in this process and once on two ranks; what it returns is compared
with a plain PyTorch loop.
"""

import re
from functools import cache

import comforts_cases as cases
import pytest
import torch
from torch.nn import functional as F

import evenflow
from evenflow.errors import ConfigError
from evenflow.runtime.recorded.microbatch import split
from unsplit import mean_square, regression

CASES = (
    cases.metrics_of_a_step,
    cases.metrics_of_a_data_set,
    cases.data_set_without_a_batch,
    cases.predictions,
    cases.fed,
    cases.told,
    cases.gauged,
    cases.evaluated_between,
    cases.averaged,
    cases.refused_on_one_rank,
    cases.interrupted,
    cases.groups_by_name,
    cases.several_optimizers,
    cases.distillation,
    cases.preferences,
    cases.alternating,
)


def run_all():
    torch.distributed.init_process_group("gloo")
    return {case.__name__: case() for case in CASES}


@cache
def on_two_ranks():
    return evenflow.launch(run_all, nproc=2)


@pytest.fixture(params=["one process", "two ranks"])
def run(request):
    """What a case returns, of every rank."""
    if request.param == "one process":
        return lambda case: [case()]
    return lambda case: [rank[case.__name__] for rank in on_two_ranks()]


def refused(text):
    return pytest.raises(ConfigError, match=f"^{re.escape(text)}")


# -- metrics and data sets


def whole_metrics(batches):
    """Loss and metrics of all rows at once."""
    batch = {key: torch.cat([each[key] for each in batches]) for key in ("x", "y")}
    with torch.no_grad():
        loss, metrics = cases.with_metrics(cases.build(), batch)
    return float(loss), {name: float(value.sum()) for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("case", "batches"),
    [(cases.metrics_of_a_step, [regression()]), (cases.metrics_of_a_data_set, cases.DATA)],
)
def test_metrics_are_those_of_all_rows(run, case, batches):
    expected_loss, expected = whole_metrics(batches)
    for loss, metrics in run(case):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_a_data_set_of_one_batch_is_that_batch():
    pipe = cases.make(loss=cases.with_metrics)
    one, all_of_it = pipe.evaluate(regression()), pipe.evaluate_all([regression()])
    assert torch.equal(one.loss, all_of_it.loss)
    assert {n: v.tolist() for n, v in one.metrics.items()} == {
        n: v.tolist() for n, v in all_of_it.metrics.items()
    }


def test_a_data_set_is_weighed_by_its_tokens():
    """Rows whose labels are ignored weigh nothing, whole batches of them neither."""
    model = torch.nn.Linear(4, 3)
    batches = [
        {"x": torch.randn(4, 4), "labels": torch.tensor(labels)}
        for labels in ([0, 1, -100, -100], [2, -100, 1, 1], [-100] * 4)
    ]
    pipe = evenflow.pipeline(
        model,
        loss=lambda m, b: F.cross_entropy(m(b["x"]), b["labels"]),
        example=batches[0],
        num_microbatches=2,
    )
    found = pipe.evaluate_all(batches).loss
    x, labels = (torch.cat([batch[key] for batch in batches]) for key in ("x", "labels"))
    torch.testing.assert_close(found, F.cross_entropy(model(x), labels).detach())


def test_sums_of_a_data_set_are_added_up():
    def loss(model, batch):
        error = model(batch["x"]) - batch["y"]
        return error.square().sum(), {"mean": error.mean()}

    found = cases.make(loss=loss, reduction="sum").evaluate_all(cases.DATA)
    batch = {key: torch.cat([each[key] for each in cases.DATA]) for key in ("x", "y")}
    expected, metrics = loss(cases.build(), batch)
    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found.metrics["mean"], metrics["mean"].detach())


def test_data_set_without_a_batch(run):
    assert set(run(cases.data_set_without_a_batch)) == {"evaluate_all: the loader gave no batch at all"}


def test_metrics_that_the_loss_does_not_return():
    with refused("metrics='average', which is none of"):
        cases.make(metrics="average")
    with refused("metrics= names 'acc', which the loss function's metrics do not have; they have 'close', "):
        cases.make(loss=cases.with_metrics, metrics={"acc": "sum"})
    with refused("metrics= is given, and the loss function returns the loss alone; return (loss, metrics)"):
        cases.make(metrics={"acc": "sum"})


# -- predictions


def test_predictions_come_to_whom_they_are_to_come(run):
    found = run(cases.predictions)
    with torch.no_grad():
        expected = cases.build()(regression()["x"])
    everywhere, first, last = zip(*found, strict=True)
    for got in (*everywhere, first[0], last[-1]):
        torch.testing.assert_close(got["p"], expected)
        assert got["kind"] == "k"
    assert [got is None for got in first[1:]] == [True] * (len(found) - 1)
    assert [got is None for got in last[:-1]] == [True] * (len(found) - 1)


def test_a_batch_that_is_fed_goes_through_the_program_that_was_called(run):
    with torch.no_grad():
        expected = cases.build()(regression()["x"])
    for loss, found, (again, num_rows) in run(cases.fed):
        assert loss == pytest.approx(float(F.mse_loss(expected, regression()["y"])))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(again, expected)
        assert num_rows == 8


def test_a_way_to_gather_that_there_is_not():
    with refused("gather='first' is none of True (every rank), 'main' (the first rank alone) and False"):
        cases.make().predict(regression(), gather="first")


# -- hooks


def test_hooks_are_told_on_the_main_rank(run):
    (losses, heard, rarely), *others = run(cases.told)
    accumulated = (losses[0] * 8 + losses[1] * 4) / 12
    assert heard == [
        (1, {"loss": pytest.approx(accumulated), "learning_rate": 0.1, "metrics/rows": 4.0}),
        (2, {"loss": losses[2], "learning_rate": 0.05, "metrics/rows": 8.0}),
        (3, {"loss": losses[3], "learning_rate": 0.025, "metrics/rows": 8.0}),
    ]
    assert rarely == [2]
    assert [other[1:] for other in others] == [([], [])] * len(others)


def test_gauges_are_those_of_the_timelines(run):
    (heard, of_all, measured), *others = run(cases.gauged)
    assert [each[:2] for each in others] == [([], [])] * len(others)
    assert [step for step, _ in of_all] == [1, 3]
    for number, numbers in enumerate(heard, start=1):
        busy, longest = measured[number - 1]
        idle = [pytest.approx(1 - each / longest, abs=1e-4) for each in busy]
        asked = number % 2 == 1 or not others
        if asked:
            assert [numbers[f"bubble/rank{rank}"] for rank in range(len(busy))] == idle
            assert numbers["bubble"] == pytest.approx(1 - sum(busy) / len(busy) / longest, abs=1e-4)
        else:
            assert 0 <= numbers["bubble/rank0"] < 1
        assert ("bubble" in numbers, "bubble/rank1" in numbers) == (asked, asked and bool(others))
        assert ("peak_bytes/rank1" in numbers) == ("bubble/rank1" in numbers)
    for (step, numbers), shown in zip(of_all, (heard[0], heard[2]), strict=True):
        gauges = {name: value for name, value in numbers.items() if "rank" in name or name == "bubble"}
        assert gauges.items() <= shown.items(), step


def test_an_evaluation_is_no_part_of_a_step(run):
    (told, evaluated_seconds), *_ = run(cases.evaluated_between)
    (_, first_wait), (step_seconds, wait_seconds) = told
    assert first_wait > 0
    assert 0 < wait_seconds < step_seconds < evaluated_seconds


def test_what_is_fed_for_an_evaluation_is_no_part_of_a_step(monkeypatch):
    """Whether it is fed inside of the training's pass, before a step or behind it, or between two passes."""
    timed, told = cases.Timed(monkeypatch), []
    pipe = timed.pipe
    pipe.log_to(lambda step, numbers: told.append((numbers["step_seconds"], numbers["wait_seconds"])))

    def evaluate():
        for held_out in pipe.feed(timed.batches(3, seconds=64.0)):
            pipe.evaluate(held_out)

    for _ in range(2):
        for batch in pipe.feed(timed.batches(2, seconds=0.25)):
            evaluate()
            pipe.step(batch)
            evaluate()
        evaluate()
    assert told == [(1.25, 0.25)] * 4


def test_a_watched_step_is_in_no_speed(monkeypatch):
    timed, each, third = cases.Timed(monkeypatch), [], []
    pipe = timed.pipe
    pipe.log_to(lambda step, numbers: each.append(dict(numbers)))
    pipe.log_to(lambda step, numbers: third.append(dict(numbers)), every=3)

    def slow():
        timed.now += 64.0
        pipe.step(regression())
        timed.now += 64.0

    pipe.step(regression())
    pipe.meter.peak_bytes(slow)
    pipe.step(regression())
    assert each[1].keys() == {"loss", "learning_rate", "peak_bytes/rank0"}
    assert [numbers["step_seconds"] for numbers in (each[0], each[2], third[0])] == [1.0] * 3
    assert [numbers["rows_per_second"] for numbers in (each[0], each[2], third[0])] == [8.0] * 3
    assert "bubble" in each[2]


def test_a_hook_is_taken_away():
    pipe, told, asked = cases.make(), [], []
    kept = pipe.log_to(lambda step, numbers: told.append(("kept", step)), all_ranks=True)
    remove = pipe.log_to(
        lambda step, numbers: told.append(("removed", step)),
        every=lambda number: asked.append(number) or True,
    )
    pipe.step(regression())
    asked.clear()
    remove()
    remove()
    pipe.step(regression())
    assert told == [("kept", 1), ("removed", 1), ("kept", 2)]
    assert not asked
    kept()
    pipe.step(regression())
    assert len(told) == 3


def test_hooks_that_cannot_work():
    with refused("hook= must be a function, not a str"):
        cases.make().log_to("runs")
    with refused("every=0 must be at least 1"):
        cases.make().log_to(print, every=0)
    with refused("every=1.5 must be a whole number"):
        cases.make().log_to(print, every=1.5)
    with refused("num_steps=0 and every=10 must be at least 1"), evenflow.progress(cases.make(), num_steps=0):
        pass


def test_tokens_are_counted_where_the_loss_is_a_mean_over_them():
    heard = []
    batch = {"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, -100, 2])}
    pipe = evenflow.pipeline(
        torch.nn.Linear(4, 3),
        loss=lambda m, b: F.cross_entropy(m(b["x"]), b["labels"]),
        example=batch,
        num_microbatches=2,
    )
    pipe.log_to(lambda step, numbers: heard.append(numbers))
    pipe.step(batch)
    (numbers,) = heard
    assert numbers["tokens_per_second"] / numbers["rows_per_second"] == pytest.approx(3 / 4)
    assert "learning_rate" not in numbers


# -- averaged parameters


def test_averaged_parameters_for_a_while(run):
    found = run(cases.averaged)
    model = cases.tied()
    optimizer = cases.adamw(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)
    for _ in range(3):
        optimizer.zero_grad()
        for part in split(regression(), 2):
            (mean_square(model, part) / 2).backward()
        optimizer.step()
        average.update_parameters(model)
    with torch.no_grad():
        expected = [float(mean_square(each, regression())) for each in (model, average)]
    for (before, inside, after, refusal), _ in found:
        assert before == after == pytest.approx(expected[0], rel=1e-5)
        assert inside == pytest.approx(expected[1], rel=1e-5)
        assert refusal == "step() was called inside swapped(): the numbers that it trained would be lost"
    ours = {name: tensor for _, mine in found for name, tensor in mine.items()}
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_averages_that_torch_keeps():
    model = cases.build()
    pipe = cases.make(model, optimizer=cases.adamw)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        pipe.step(regression())
        average.update_parameters(model)
    with pipe.swapped(dict(average.module.named_parameters())):
        found = pipe.evaluate(regression()).loss
    with torch.no_grad():
        torch.testing.assert_close(found, mean_square(average, regression()))
    pipe.step(regression())


def test_numbers_that_fit_on_one_rank_alone(run):
    for errors in run(cases.refused_on_one_rank):
        names = {kind for kind, _ in errors}
        assert names <= {"ConfigError", "PeerError"}
        assert len(errors) == 2


def test_after_an_error_inside_the_parameters_are_the_trained_ones():
    model = cases.build()
    pipe, before = cases.make(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in pipe.named_parameters()}

    def fail():
        with pipe.swapped(zeros):
            assert not any(parameter.any() for parameter in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pipe.step(regression())


def test_numbers_that_do_not_fit():
    pipe = cases.make()
    with refused("swapped(): the model has no parameter 'encoder'"), pipe.swapped({"encoder": torch.ones(1)}):
        pass
    with (
        refused("swapped(): 0.bias has shape [8], and is given [1]"),
        pipe.swapped({"0.bias": torch.ones(1)}),
    ):
        pass


# -- state


def test_a_run_that_was_interrupted_goes_on_as_it_would_have(run):
    for losses, resumed in run(cases.interrupted):
        assert losses[3:] == resumed


def test_a_state_suits_another_cut():
    def loss_after(split):
        pipe = cases.make(split=split, optimizer=cases.by_name)
        pipe.load_state_dict(state)
        return [float(pipe.step(regression()).loss) for _ in range(2)]

    pipe = cases.make(optimizer=cases.by_name)
    pipe.step(regression())
    for optimizer in pipe.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.01  # as a schedule changes it
    state = pipe.state_dict()
    assert loss_after(["2", "4"]) == loss_after(["6"]) == loss_after(["4"])


def test_weights_alone():
    pipe = cases.make()
    pipe.step(regression())
    state = {"model": {name: tensor.clone() for name, tensor in pipe.state_dict()["model"].items()}}
    loss = float(pipe.step(regression()).loss)
    pipe.load_state_dict(state, optimizer=False)
    assert float(pipe.step(regression()).loss) == loss
    assert pipe.state_dict()["step"] == 3


def test_states_that_do_not_fit():
    pipe = cases.make()
    state = pipe.state_dict()
    with refused("load: there is no parameter 0.weight; merge the states of all processes"):
        pipe.load_state_dict(state | {"model": {}})
    with refused("load: the parameter 0.weight has shape [1], and the model's [8, 4]"):
        pipe.load_state_dict(state | {"model": state["model"] | {"0.weight": torch.ones(1)}})
    pipe.step(regression(), update=False)
    with refused("state_dict() was called while gradients accumulate, which it does not hold"):
        pipe.state_dict()


# -- several optimizers, groups by name


def plain_weights(optimizer):
    model = cases.build()
    made = optimizer(list(model.named_parameters()))
    made = made if isinstance(made, list) else [made]
    for _ in range(3):
        model.zero_grad()
        for part in split(regression(), 2):
            mean_square(model, part).backward(torch.tensor(0.5))
        for each in made:
            each.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [(cases.groups_by_name, cases.by_name), (cases.several_optimizers, cases.two_optimizers)],
)
def test_parameters_go_to_groups_and_optimizers_by_name(run, case, optimizer):
    expected = plain_weights(optimizer)
    found = {name: tensor for rank in run(case) for name, tensor in rank.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_optimizers_that_cannot_work():
    with refused("optimizer= returned a list; it must return a torch.optim.Optimizer"):
        cases.make(optimizer=lambda named: [3])
    with refused("optimizer= returned LBFGS, which runs the model itself"):
        cases.make(optimizer=lambda named: [torch.optim.LBFGS([p]) for _, p in named])
    with refused("optimizer= returned 2 optimizers, of which two have the parameter 0.weight; give each"):
        cases.make(optimizer=lambda named: [torch.optim.SGD(named, lr=0.1) for _ in range(2)])


# -- several models in one


def plain_losses(build, loss, batch, num_steps=3):
    model = build()
    optimizer = cases.adamw([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        parts = []
        for part in split(batch, 2):
            returned = loss(model, part)
            found = returned[0] if isinstance(returned, tuple) else returned
            found.backward(torch.tensor(0.5))
            parts.append(found.detach() * 0.5)
        losses.append(float(torch.stack(parts).sum()))
        optimizer.step()
    return losses


def test_distillation_from_a_frozen_teacher(run):
    expected = plain_losses(cases.student_and_teacher, cases.distilled, regression())
    assert all(losses == expected for losses in run(cases.distillation))


def test_preferences_beside_a_frozen_reference(run):
    expected = plain_losses(cases.policy_and_reference, cases.preference, cases.pairs())
    assert all(losses == expected for losses in run(cases.preferences))


def test_several_models_are_handed_over_as_one():
    with refused(
        "the model is a dict; several models (a student and its teacher) are handed over as one: torch"
    ):
        cases.make({"student": cases.build()})
    with refused("the model is a str; it must be a torch.nn.Module"):
        cases.make("gpt2")


# -- losses that take turns


def plain_rounds():
    model, losses = cases.players(), []
    optimizers = {name: cases.adamw(list(player.named_parameters())) for name, player in model.items()}
    for number in range(3):
        for turn, optimizer in reversed(optimizers.items()):
            model.zero_grad()
            parts = []
            for part in split({**cases.rounds(number), "turn": turn}, 2):
                loss = cases.adversarial(model, part)
                loss.backward(torch.tensor(0.5))
                parts.append(loss.detach() * 0.5)
            losses.append(float(torch.stack(parts).sum()))
            optimizer.step()
    return losses, dict(model.named_parameters())


def test_losses_that_take_turns(run):
    """A plain value of the batch says whose turn it is; the other player is frozen for it."""
    expected, weights = plain_rounds()
    found = run(cases.alternating)
    assert all(losses == expected for losses, _ in found)
    ours = {name: tensor for _, mine in found for name, tensor in mine.items()}
    assert ours.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("losses", [{"critic": mean_square}, [mean_square, mean_square]])
def test_several_losses_are_one_function(losses):
    kind = type(losses).__name__
    with refused(
        f"loss= must be a function, not a {kind}; where losses take turns (a GAN's), give one function"
    ):
        cases.make(loss=losses)
