"""What the tests of training comforts do in one process and on two: functions of a pipeline's options.

Each returns plain data, the same on every rank unless it says otherwise.
"""

import copy
import time
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.pipe.state import merged
from unsplit import mean_square, mlp, regression, sgd


def build():
    return mlp(4, 8, 8, 8, 1)


def tied():
    """The second and third matrix are one, used on both of two stages."""
    model = build()
    model[4].weight = model[2].weight
    return model


def make(model=None, **options):
    options = {
        "loss": mean_square,
        "example": regression(),
        "num_microbatches": 2,
        "optimizer": sgd,
        "split": ["4"],
        "device": "cpu",
    } | options
    return evenflow.pipeline(build() if model is None else model, **options)


def adamw(named):
    return torch.optim.AdamW(named, lr=0.05)


# -- metrics and data sets


def with_metrics(model, batch):
    prediction = model(batch["x"])
    error = (prediction - batch["y"]).abs()
    metrics = {"close": (error < 0.5).sum(), "worst": error.max(), "mean": error.mean(), "rows": error[:, 0]}
    return F.mse_loss(prediction, batch["y"]), metrics


WAYS = {"worst": "max", "close": "sum", "rows": lambda parts: sum(float(part.sum()) for part in parts)}
DATA = [regression(8), regression(4), regression(6)]


def metrics_of_a_step():
    pipe = make(loss=with_metrics, metrics=WAYS, num_microbatches=3)
    result = pipe.step(regression())
    return float(result.loss), {name: float(value) for name, value in result.metrics.items()}


def metrics_of_a_data_set():
    pipe = make(loss=with_metrics, metrics=WAYS, num_microbatches=2)
    result = pipe.evaluate_all(DATA)
    return float(result.loss), {name: float(value) for name, value in result.metrics.items()}


def data_set_without_a_batch():
    try:
        make().evaluate_all([])
    except evenflow.ConfigError as error:
        return str(error)
    return None


# -- predictions


def predictions():
    """On each rank: what it got from each way to gather."""
    pipe = make()
    batch = regression()

    def both(model, microbatch):
        return {"p": model(microbatch["x"]), "kind": "k"}

    return [pipe.predict(batch, both, gather=gather) for gather in (True, "main", False)]


def fed():
    """On each rank: a loss, predictions, what another function returned, of batches that the first reads."""
    pipe = make()

    def one(model, microbatch):
        return model(microbatch["x"])

    def both(model, microbatch):
        return model(microbatch["x"]), len(microbatch["x"])

    (loss,) = [float(pipe.evaluate(batch).loss) for batch in pipe.feed([regression()])]
    (found,) = [pipe.predict(batch, one) for batch in pipe.feed([regression()])]
    (pair,) = [pipe.predict(batch, both) for batch in pipe.feed([regression()])]
    return loss, found, pair


# -- hooks


def told():
    """What a hook was told on each rank, without the speeds, and the steps that a second one was told of."""
    pipe = make(
        loss=lambda model, batch: (mean_square(model, batch), {"rows": len(batch["x"])}),
        optimizer=lambda named: torch.optim.SGD(named, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    heard, rarely = [], []
    pipe.log_to(lambda step, numbers: heard.append((step, dict(numbers))))
    pipe.log_to(lambda step, numbers: rarely.append(step), every=2)
    losses = [
        float(pipe.step(regression(8), update=False).loss),
        *(float(pipe.step(regression(rows)).loss) for rows in (4, 8, 8)),
    ]
    for _, numbers in heard:
        assert numbers.pop("rows_per_second") > 0
        assert numbers.pop("step_seconds") > 0
        assert 0 <= numbers.pop("bubble/rank0") < 1
        assert numbers.pop("peak_bytes/rank0") > 2**20  # Python and torch alone
        numbers.pop("bubble", None)  # known in a single process
    return losses, heard, rarely


def gauged():
    """What hooks were told of all ranks and of the main one, and what the timelines say of the same steps.

    Of the timelines, for each process: what it computed, and the longest time from a first op to a last.
    """
    pipe = make(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)))
    heard, of_all, measured = [], [], []
    pipe.log_to(lambda step, numbers: heard.append(dict(numbers)))
    pipe.log_to(
        lambda step, numbers: of_all.append((step, dict(numbers))),
        every=lambda number: number % 2 == 1,
        all_ranks=True,
    )
    loader = [regression()] * 3
    for batch in pipe.feed(loader):
        pipe.step(batch)
        lanes = pipe.timelines()[1].lanes
        busy, windows = [lane.busy_seconds for lane in lanes], [lane.window_seconds for lane in lanes]
        if not torch.distributed.is_initialized():  # one process, whose ranks take turns
            busy = [sum(busy)]
            windows = [(min(start for start, _ in windows), max(end for _, end in windows))]
        measured.append((busy, max(end - start for start, end in windows)))
    return heard, of_all, measured


def evaluated_between():
    """The seconds that a hook was told of two steps and of their batches, and what evaluations took."""
    pipe = make()
    told = []
    pipe.log_to(lambda step, numbers: told.append((numbers["step_seconds"], numbers["wait_seconds"])))
    evaluated_seconds = 0.0
    for batch in pipe.feed([regression()] * 2):
        pipe.step(batch)
        start = time.perf_counter()
        for _ in range(50):
            pipe.evaluate(batch)
        evaluated_seconds = time.perf_counter() - start
    return told, evaluated_seconds


class Timed:
    """A pipeline of which an update takes one second of a clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("evenflow.pipe.times.logs.time", SimpleNamespace(perf_counter=lambda: self.now))
        self.pipe = make(scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate))

    def _rate(self, _):
        self.now += 0.5  # for each of two stages
        return 1.0

    def batches(self, number, seconds):
        """So many, each of which takes so long to be read."""
        for _ in range(number):
            self.now += seconds
            yield regression()


# -- averaged parameters


def averaged(model=None):
    """Losses with averaged weights and with those trained, and the averages; these on each rank its own."""
    pipe = make(tied() if model is None else model, optimizer=adamw)
    average = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    for _ in range(3):
        pipe.step(regression())
        for name, parameter in pipe.named_parameters():
            average[name].lerp_(parameter.detach(), 0.5)
    before = float(pipe.evaluate(regression()).loss)
    with pipe.swapped(average):
        inside = float(pipe.evaluate(regression()).loss)
        refusal = None
        try:
            pipe.step(regression())
        except evenflow.ConfigError as error:
            refusal = str(error)
    after = float(pipe.evaluate(regression()).loss)
    return (before, inside, after, refusal), average


def refused_on_one_rank():
    """The kinds and texts of what ranks say to numbers that do not fit the first one's, and it goes on."""
    pipe = make(tied())
    misfit = {"0.weight": torch.ones(1)}
    errors = []

    def inside():
        with pipe.swapped(misfit):
            raise AssertionError("never here")

    state = pipe.state_dict()
    for act in (inside, lambda: pipe.load_state_dict(state | {"model": state["model"] | misfit})):
        try:
            act()
        except evenflow.EvenflowError as error:
            errors.append((type(error).__name__, str(error)))
    pipe.step(regression())
    return errors


# -- state


def interrupted():
    """Losses of a run of six steps, and of one that goes on in a new pipeline after three; with dropout."""

    def noisy():
        model = tied()
        model.insert(2, nn.Dropout(0.5))
        return make(
            model,
            split=["5"],
            optimizer=lambda named: [adamw(named[:1]), torch.optim.SGD(named[1:], lr=0.05, momentum=0.9)],
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        )

    pipe = noisy()
    losses = [float(pipe.step(regression()).loss) for _ in range(3)]
    state = copy.deepcopy(merged(pipe.meter.gather(pipe.state_dict())))
    losses += [float(pipe.step(regression()).loss) for _ in range(3)]
    again = noisy()
    again.load_state_dict(state)
    return losses, [float(again.step(regression()).loss) for _ in range(3)]


# -- several optimizers, groups by name


def by_name(named):
    """Decay for matrices alone."""
    return torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.5},
            {"params": [(n, p) for n, p in named if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=0.05,
    )


def two_optimizers(named):
    """Muon for matrices, AdamW for the rest."""
    return [
        torch.optim.Muon([(n, p) for n, p in named if p.dim() == 2], lr=0.05),
        torch.optim.AdamW([(n, p) for n, p in named if p.dim() != 2], lr=0.05),
    ]


def trained_with(optimizer):
    """The weights of this rank after three steps."""
    pipe = make(optimizer=optimizer)
    for _ in range(3):
        pipe.step(regression())
    return {name: p.detach().clone() for name, p in pipe.named_parameters()}


def groups_by_name():
    return trained_with(by_name)


def several_optimizers():
    return trained_with(two_optimizers)


# -- several models in one


def distilled(model, batch):
    with torch.no_grad():
        wanted = model["teacher"](batch["x"])
    found = model["student"](batch["x"])
    return 0.5 * F.mse_loss(found, batch["y"]) + 0.5 * F.mse_loss(found, wanted)


def student_and_teacher():
    model = nn.ModuleDict({"teacher": mlp(4, 16, 16, 1), "student": mlp(4, 8, 8, 1)})
    model["teacher"].requires_grad_(False).eval()
    return model


def log_odds(model, batch):
    return F.logsigmoid(model(batch["chosen"])) - F.logsigmoid(model(batch["rejected"]))


def preference(model, batch):
    """Direct preference optimisation, of numbers in the place of texts."""
    with torch.no_grad():
        reference = log_odds(model["reference"], batch)
    margin = log_odds(model["policy"], batch) - reference
    return -F.logsigmoid(0.1 * margin).mean(), {"accuracy": (margin > 0).float().mean()}


def policy_and_reference():
    model = nn.ModuleDict({"policy": mlp(4, 8, 8, 1), "reference": mlp(4, 8, 8, 1)})
    model["reference"].requires_grad_(False)
    return model


def pairs():
    return {"chosen": regression(8)["x"], "rejected": regression(16)["x"][8:]}


def losses_of(build, loss, batch, num_steps=3):
    pipe = make(build(), loss=loss, example=batch, optimizer=adamw, split=None, stages=2, max_leaf_share=0.0)
    return [float(pipe.step(batch).loss) for _ in range(num_steps)]


def distillation():
    return losses_of(student_and_teacher, distilled, regression())


def preferences():
    return losses_of(policy_and_reference, preference, pairs())


# -- losses that take turns


def players():
    return nn.ModuleDict({"generator": mlp(4, 8, 2), "critic": mlp(2, 8, 1)})


def adversarial(model, batch):
    made = model["generator"](batch["noise"])
    if batch["turn"] == "critic":
        real, fake = model["critic"](batch["real"]), model["critic"](made.detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.softplus(-model["critic"](made)).mean()


def rounds(number):
    generator = torch.Generator().manual_seed(number)
    return {
        "noise": torch.randn(8, 4, generator=generator),
        "real": torch.randn(8, 2, generator=generator) + 1,
    }


def alternating():
    """Losses of three rounds of a critic and a generator, and this rank's weights."""
    model = players()
    pipe = make(
        model,
        loss=adversarial,
        example={**rounds(0), "turn": "generator"},
        optimizer=adamw,
        split=None,
        stages=2,
        max_leaf_share=0.0,
        reduction="item-mean",
    )
    losses = []
    for number in range(3):
        for turn in ("critic", "generator"):
            for name, player in model.items():
                player.requires_grad_(name == turn)
            losses.append(float(pipe.step({**rounds(number), "turn": turn}).loss))
    return losses, {name: p.detach().clone() for name, p in pipe.named_parameters()}
