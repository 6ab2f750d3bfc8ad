"""Programs with Python values and state that a recording could freeze: each is right, or refused by name."""

import copy
import functools
import itertools
import os
import random
import types

import numpy as np
import pytest
import torch
from adversaries import WIDTH, Cases, Program, data, net, square
from torch import nn
from torch.nn import functional as F

cases = Cases()
program = cases.program


def straight(self, x):
    return self.head(self.b(self.a(x)))


def knobbed(self, x):
    return self.head(self.c(self.knob(self.b(self.a(x)))))


def told(self, x):
    """The knob is told the batch, too."""
    return self.head(self.c(self.knob(self.b(self.a(x)), x)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = 1.0

    def forward(self, x):
        return x * self.alpha


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def turn(model, step):
    model.knob.alpha = 1.0 + step


# -- a number of the model, changed between steps


@program()
def a_public_attribute():
    return Program(net(knobbed, knob=Scale()), change=turn)


@program(culprit="_scale")
def a_private_attribute():
    def change(model, step):
        model._scale = 1.0 + step

    return Program(net(lambda self, x: self.head(self.b(self.a(x)) * self._scale)), change=change)


@program(culprit="config")
def an_attribute_of_an_attribute():
    def change(model, step):
        model.config.alpha = 1.0 + step

    run = lambda self, x: self.head(self.b(self.a(x)) * self.config.alpha)  # noqa: E731
    return Program(net(run, config=types.SimpleNamespace(alpha=1.0)), change=change)


@program(culprit="alpha")
def an_attribute_of_the_class():
    def change(model, step):
        type(model).alpha = 1.0 + step

    return Program(net(lambda self, x: self.head(self.b(self.a(x)) * self.alpha)), change=change)


@program(culprit="alpha")
def a_property():
    model = net(lambda self, x: self.head(self.b(self.a(x)) * self.alpha))
    type(model).alpha = property(lambda self: settings["alpha"])
    return Program(model, change=lambda model, step: settings.update(alpha=1.0 + step))


settings = {"alpha": 1.0}


@program(culprit="settings")
def a_global_of_a_forward():
    return Program(
        net(lambda self, x: self.head(self.b(self.a(x)) * settings["alpha"])),
        change=lambda model, step: settings.update(alpha=1.0 + step),
    )


@program(culprit="environ")
def the_environment():
    def change(model, step):
        os.environ["EVENFLOW_TEST_ALPHA"] = str(1.0 + step)

    return Program(
        net(lambda self, x: self.head(self.b(self.a(x)) * float(os.environ["EVENFLOW_TEST_ALPHA"]))),
        change=change,
    )


@program(culprit="knob")
def an_attribute_of_a_module_that_is_never_called():
    return Program(
        net(lambda self, x: self.head(self.b(self.a(x)) * self.knob.alpha), knob=Scale()), change=turn
    )


@program(culprit="knob")
def an_attribute_of_a_leaf_read_by_the_loss():
    return Program(
        net(knobbed, knob=Scale()), lambda model, batch: square(model, batch) * model.knob.alpha, change=turn
    )


@program(culprit="knob")
def an_attribute_of_a_module_whose_forward_is_called():
    run = lambda self, x: self.head(self.knob.forward(self.b(self.a(x))))  # noqa: E731
    return Program(net(run, knob=Scale()), change=turn)


@program(culprit="knob")
def a_buffer_of_a_module_that_is_never_called():
    def change(model, step):
        model.knob.scale = torch.tensor(1.0 + step)

    knob = nn.Module()
    knob.register_buffer("scale", torch.ones(()))
    return Program(
        net(lambda self, x: self.head(self.b(self.a(x)) * self.knob.scale), knob=knob), change=change
    )


@program(culprit="table")
def an_array_read_as_a_number():
    def change(model, step):
        model.table[0] = 1.0 + step

    run = lambda self, x: self.head(self.b(self.a(x)) * float(self.table[0]))  # noqa: E731
    return Program(net(run, table=np.ones(2)), change=change)


@program(
    culprit="table|ndarray",
)
def an_array_made_a_tensor():
    def change(model, step):
        model.table[0] = 1.0 + step

    run = lambda self, x: self.head(self.b(self.a(x)) * torch.tensor(self.table))  # noqa: E731
    return Program(net(run, table=np.ones(WIDTH, dtype=np.float32)), change=change)


class Configured(nn.Module):
    def forward(self, x, config):
        return x * config.alpha


@program(
    culprit="config|Namespace",
)
def an_object_among_the_arguments():
    def change(model, step):
        model.config.alpha = 1.0 + step

    def run(self, x):
        return self.head(self.knob(self.b(self.a(x)), self.config))

    return Program(net(run, knob=Configured(), config=types.SimpleNamespace(alpha=1.0)), change=change)


@program()
def a_tensor_attribute():
    def change(model, step):
        model.kept.fill_(1.0 + step)
        model.other = torch.tensor(2.0 + step)

    model = net(lambda self, x: self.head(self.b(self.a(x)) * self.kept * self.other))
    vars(model)["kept"] = torch.ones(())
    return Program(model, change=change)


@program()
def tensors_inside_objects():
    def change(model, step):
        model.config.t.fill_(1.0 + step)
        model.listed[0].fill_(2.0 + step)

    run = lambda self, x: self.head(self.b(self.a(x)) * self.config.t * self.listed[0])  # noqa: E731
    return Program(
        net(run, config=types.SimpleNamespace(t=torch.ones(WIDTH)), listed=[torch.ones(WIDTH)]), change=change
    )


@program()
def a_buffer_read_as_a_number():
    def change(model, step):
        model.w.fill_(1.0 + step)

    return Program(
        net(lambda self, x: self.head(self.b(self.a(x)) * float(self.w)), w=torch.ones(())), change=change
    )


# -- the loss function's own


def weighing(step_into):
    """A change of the loss function that does not ask for the model."""
    return lambda model, step: step_into(1.0 + step)


@program(culprit="scale|alpha")
def a_loss_with_an_object():
    config = types.SimpleNamespace(alpha=1.0)
    loss = functools.partial(lambda config, model, batch: square(model, batch) * config.alpha, config)
    return Program(net(straight), loss, change=weighing(lambda alpha: setattr(config, "alpha", alpha)))


def weighted(value):
    return value * settings["alpha"]


@program(culprit="settings")
def a_loss_with_a_helper():
    loss = lambda model, batch: weighted(square(model, batch))  # noqa: E731
    return Program(net(straight), loss, change=weighing(lambda alpha: settings.update(alpha=alpha)))


@program(culprit="settings")
def a_loss_with_a_function_inside():
    def loss(model, batch):
        def inner(value):
            return value * settings["alpha"]

        return inner(square(model, batch))

    return Program(net(straight), loss, change=weighing(lambda alpha: settings.update(alpha=alpha)))


@program(culprit="settings")
def a_loss_that_is_wrapped():
    def wrapped(function):
        @functools.wraps(function)
        def call(*args):
            return function(*args)

        return call

    loss = wrapped(lambda model, batch: square(model, batch) * settings["alpha"])
    return Program(net(straight), loss, change=weighing(lambda alpha: settings.update(alpha=alpha)))


@program(culprit="criterion")
def a_loss_whose_criterion_is_replaced():
    criteria = {"now": F.mse_loss}

    def criterion(found, wanted):
        return criteria["now"](found, wanted)

    def change(model, step):
        criteria["now"] = F.l1_loss if step else F.mse_loss

    loss = lambda model, batch: criterion(model(batch["x"]), batch["y"])  # noqa: E731
    return Program(net(straight), loss, change=change)


class Slotted:
    __slots__ = ("alpha",)

    def __call__(self, model, batch):
        return square(model, batch) * self.alpha


@program(culprit="alpha")
def a_loss_with_slots():
    loss = Slotted()
    loss.alpha = 1.0
    return Program(net(straight), loss, change=weighing(lambda alpha: setattr(loss, "alpha", alpha)))


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = 1.0

    def loss(self, model, batch):
        return square(model, batch) * self.alpha


@program(culprit="alpha")
def a_loss_that_is_a_modules_method():
    trainer = Trainer()
    return Program(
        net(straight), trainer.loss, change=weighing(lambda alpha: setattr(trainer, "alpha", alpha))
    )


class Criterion:
    alpha = 1.0

    def loss(self, model, batch):
        return square(model, batch) * self.alpha


@program(culprit="alpha")
def a_loss_with_a_class_attribute():
    loss = type("Criterion", (Criterion,), {})
    return Program(net(straight), loss().loss, change=weighing(lambda alpha: setattr(loss, "alpha", alpha)))


@program(culprit="HuberLoss|delta")
def a_loss_with_a_module_without_parameters():
    huber = nn.HuberLoss()
    loss = lambda model, batch: huber(model(batch["x"]), batch["y"])  # noqa: E731
    return Program(net(straight), loss, change=weighing(lambda alpha: setattr(huber, "delta", 0.3 / alpha)))


@program(culprit="Dropout|training")
def a_loss_with_a_module_in_training():
    dropout = nn.Dropout(1.0)
    loss = lambda model, batch: F.mse_loss(dropout(model(batch["x"])), batch["y"])  # noqa: E731
    return Program(net(straight), loss, change=lambda model, step: dropout.train(step == 0) and None)


@program(culprit="tensor")
def a_loss_with_a_tensor():
    weight = torch.ones(())
    loss = lambda model, batch: square(model, batch) * weight  # noqa: E731
    return Program(net(straight), loss, change=weighing(weight.fill_))


@program(culprit="not part of the model")
def a_teacher_outside_of_the_model():
    model = net(straight)
    vars(model)["teacher"] = copy.deepcopy(model)

    def loss(model, batch):
        with torch.no_grad():
            wanted = model.teacher(batch["x"])
        return F.mse_loss(model(batch["x"]), wanted)

    return Program(model, loss)


@program(culprit="not part of the model")
def layers_in_a_plain_list():
    torch.manual_seed(9)
    return Program(net(lambda self, x: self.head(self.b(self.rest[0](self.a(x)))), rest=[nn.Linear(4, 4)]))


# -- state that a call changes


@program(culprit="_calls")
def a_private_counter():
    def run(self, x):
        self._calls += 1
        return self.head(self.b(self.a(x)) * self._calls)

    return Program(net(run, _calls=0))


@program()
def a_public_counter():
    return Program(net(knobbed, knob=Counter()))


@program(culprit="knob")
def a_counter_whose_forward_is_called():
    return Program(net(lambda self, x: self.head(self.knob.forward(self.b(self.a(x)))), knob=Counter()))


@program(culprit="calls")
def a_counter_in_another_method():
    def encode(self, x):
        self.calls += 1
        return self.head(self.b(self.a(x)) * self.calls)

    model = net(straight, calls=0)
    type(model).encode = encode
    return Program(model, lambda model, batch: F.mse_loss(model.encode(batch["x"]), batch["y"]))


@program(culprit="last")
def state_that_the_loss_keeps_on_the_model():
    def loss(model, batch):
        found = square(model, batch)
        model.last = found.detach() + getattr(model, "last", 0.0)
        return found * model.last

    return Program(net(straight), loss)


@program(culprit="differ at mul")
def a_counter_read_by_the_parent():
    def run(self, x):
        h = self.knob(self.b(self.a(x)))
        return self.head(h * self.knob.calls)

    return Program(net(run, knob=Counter()))


class Telling(Counter):
    def forward(self, x):
        self.calls += 1
        return x * 1.0, self.calls


@program(culprit="knob")
def a_counter_returned():
    def run(self, x):
        h, calls = self.knob(self.b(self.a(x)))
        return self.head(h * calls)

    return Program(net(run, knob=Telling()))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = {"calls": [0]}

    def forward(self, x):
        self.state["calls"][0] += 1
        return x * self.state["calls"][0]


@program()
def a_counter_in_a_nested_list():
    return Program(net(knobbed, knob=Nested()))


@program(culprit="state|calls")
def a_counter_in_an_object():
    def run(self, x):
        self.state.calls += 1
        return self.head(self.b(self.a(x)) * self.state.calls)

    return Program(net(run, state=types.SimpleNamespace(calls=0)))


@program(culprit="calls")
def a_counter_in_the_class():
    def run(self, x):
        type(self).calls = getattr(type(self), "calls", 0) + 1
        return self.head(self.b(self.a(x)) * type(self).calls)

    return Program(net(run))


@program(culprit="differ|same|twice")
def a_counter_in_a_closure_of_forward():
    calls = []

    def run(self, x):
        calls.append(1)
        return self.head(self.b(self.a(x)) * len(calls))

    return Program(net(run))


@program(culprit="numbers|cycle|differ|same|twice")
def an_iterator():
    run = lambda self, x: self.head(self.b(self.a(x)) * next(self.numbers))  # noqa: E731
    return Program(net(run, numbers=itertools.cycle([1.0, 2.0, 3.0, 4.0])))


@program(culprit="random|differ|same|twice")
def a_random_generator_of_python():
    return Program(net(lambda self, x: self.head(self.b(self.a(x)) * self.r.random()), r=random.Random(0)))


@program(culprit="random|differ|same|twice")
def a_random_generator_of_numpy():
    run = lambda self, x: self.head(self.b(self.a(x)) * float(self.r.random()))  # noqa: E731
    return Program(net(run, r=np.random.default_rng(0)))


@program(culprit="differ|same|twice")
def a_clock():
    time = itertools.count(1)
    return Program(net(straight), lambda model, batch: square(model, batch) * next(time))


@program(culprit="that an earlier call of the program made")
def an_activation_kept_for_the_next_microbatch():
    kept = []

    def run(self, x):
        h = self.b(self.a(x))
        if kept:
            h = h + kept[-1]
        kept.append(h.detach())
        return self.head(self.c(h))

    return Program(net(run))


@program(culprit="_first")
def the_first_batch_kept():
    def run(self, x):
        if self._first is None:
            self._first = x.clone()
        return self.head(self.b(self.a(x)) * self._first)

    return Program(net(run, _first=None))


@program(culprit="_sum")
def what_depends_on_the_first_weights_kept():
    def run(self, x):
        if self._sum is None:
            self._sum = self.b.weight.detach().sum()
        return self.head(self.b(self.a(x)) * self._sum)

    return Program(net(run, _sum=None))


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        self.average = torch.zeros(2, WIDTH)

    def forward(self, x):
        self.average = 0.5 * self.average + x.detach()
        return x + self.average


@program()
def a_hidden_state_carried_over():
    return Program(net(knobbed, knob=Averaging()))


class Unregistered(nn.Module):
    def __init__(self, place):
        super().__init__()
        self.tensors = [torch.zeros(())]
        self.tensor = self.tensors[0] if place == "attribute" else None

    def forward(self, x):
        tensor = self.tensors[0] if self.tensor is None else self.tensor
        tensor += 1
        return x + tensor


UNREGISTERED = "a tensor that is no buffer is really changed by the recording, which counts as a call"


@program(culprit="knob")
def a_counter_in_a_tensor_attribute():
    return Program(net(knobbed, knob=Unregistered("attribute")))


@program(culprit="knob")
def a_counter_in_a_listed_tensor():
    return Program(net(knobbed, knob=Unregistered("list")))


@program()
def masks_cached_by_length():
    def run(self, x):
        rows = x.shape[0]
        if rows not in self._cache:
            self._cache[rows] = torch.arange(4.0) * rows
        return self.head(self.b(self.a(x)) * self._cache[rows])

    return Program(net(run, _cache={}), batch=lambda step: data(step)[:2] + data(step, rows=3)[:1])


# -- buffers


@program()
def a_buffer_changed_through_a_view():
    def run(self, x):
        first = self.k[:1]
        h = self.c(self.b(self.a(x) * self.k.sum()))
        with torch.no_grad():
            first.add_(1.0)
        return self.head(h)

    return Program(net(run, k=torch.ones(2)))


@program()
def a_codebook():
    def run(self, x):
        h = self.b(self.a(x))
        at = torch.cdist(h, self.book).argmin(1)
        q = self.book[at]
        with torch.no_grad():
            chosen = F.one_hot(at, 5).float()
            self.size.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.total.mul_(0.9).add_(chosen.T @ h, alpha=0.1)
            self.book.data.copy_(self.total / self.size[:, None])
        return self.head(self.c(h + (q - h).detach()))

    torch.manual_seed(1)
    return Program(net(run, book=torch.randn(5, WIDTH), size=torch.ones(5), total=torch.ones(5, WIDTH)))


@program(
    culprit="k2?|memory",
)
def two_buffers_over_one_memory():
    def run(self, x):
        h = self.c(self.b(self.a(x)))
        self.k.add_(1.0)
        return self.head(h + self.k2[0])

    model = net(run, k=torch.ones(4))
    model.register_buffer("k2", model.k[:2])
    return Program(model)


class Replacing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("k", torch.ones(()))

    def forward(self, x):
        self.k = self.k * 0.5 + x.detach().mean()
        return x * 2


@program(culprit="knob.k")
def a_buffer_read_before_its_owner_replaces_it():
    def run(self, x):
        h = self.a(x) * self.knob.k
        return self.head(self.c(self.knob(self.b(h))))

    return Program(net(run, knob=Replacing()))


@program()
def a_buffer_read_after_its_owner_replaced_it():
    def run(self, x):
        h = self.knob(self.b(self.a(x)))
        return self.head(h * self.knob.k)

    return Program(net(run, knob=Replacing()))


@program(culprit="calls")
def a_branch_on_a_counting_buffer():
    def run(self, x):
        h = self.a(x)
        if self.calls.item() < 2:
            h = h * 2
        self.calls.add_(1)
        return self.head(self.b(h))

    return Program(net(run, calls=torch.zeros(())))


@program()
def running_statistics():
    def run(self, x):
        h = self.norm(self.a(x) - self.other.running_mean)
        h = F.batch_norm(h, self.mean, self.var, training=True)
        return self.head(self.other(self.norm(self.b(h)) + self.mean.sum()))

    norms = {"norm": nn.BatchNorm1d(WIDTH, momentum=None), "other": nn.BatchNorm1d(WIDTH)}
    return Program(net(run, mean=torch.zeros(WIDTH), var=torch.ones(WIDTH), **norms))


@program()
def a_statistic_of_the_end_used_at_the_start():
    def run(self, x):
        h = self.c(self.b(self.a(x) * self.s.clone()))
        with torch.no_grad():
            self.s.copy_(h.abs().mean())
        return self.head(h)

    return Program(net(run, s=torch.ones(())))


@program()
def a_queue_of_activations():
    def run(self, x):
        h = self.b(self.a(x))
        with torch.no_grad():
            self.queue[self.at] = h[:1].detach()
            self.at.copy_((self.at + 1) % 3)
        return self.head(self.c(h) * self.queue.clone().sum())

    return Program(net(run, queue=torch.ones(3, WIDTH), at=torch.zeros(1, dtype=torch.long)))


@program()
def an_average_of_weights_that_is_used():
    def run(self, x):
        with torch.no_grad():
            self.average.mul_(0.9).add_(self.b.weight, alpha=0.1)
        return self.head(self.c(F.linear(self.b(self.a(x)), self.average)))

    return Program(net(run, average=torch.ones(WIDTH, WIDTH)))


class Context:
    def __init__(self):
        self.calls = 0


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context):
        context.calls += 1
        return self.layer(x) * context.calls


@program(
    culprit="Context",
)
def a_counter_in_an_object_that_is_handed_around():
    def run(self, x):
        context, h = Context(), self.a(x)
        for layer in (self.p, self.q, self.r):
            h = layer(h, context)
        return self.head(h)

    torch.manual_seed(4)
    layers = {"p": Sharing(), "q": Sharing(), "r": Sharing()}
    return Program(net(run, **layers), options={"atomic": [Sharing]})


@program(culprit="function|batch")
def a_function_in_the_batch():
    alpha = [1.0]

    def scale():
        return alpha[0]

    def change(model, step):
        alpha[0] = 1.0 + step

    def batch(step):
        return [item | {"scale": scale} for item in data(step)]

    loss = lambda model, batch: square(model, batch) * batch["scale"]()  # noqa: E731
    return Program(net(straight), loss, batch, change)


# -- leaves that run live


class Branching(nn.Module):
    """Does one thing or the other with what it is handed, as the batch says."""

    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, h, x):
        return (self.one if x.mean() > 0.5 else self.other)(self, h)


@program(culprit="knob returned a tensor, and its input")
def a_pinned_leaf_that_returns_its_input():
    knob = Branching(lambda _, h: h, lambda _, h: h * 2)
    return Program(net(told, knob=knob), options={"atomic": [Branching]})


@program()
def a_leaf_that_detaches():
    def run(self, x):
        k = self.knob(self.a(x), x)
        return self.head(self.c(self.b(k) * k) * k)

    knob = Branching(lambda _, h: h.detach() * 1.0, lambda _, h: h * 1.0)
    return Program(net(run, knob=knob), options={"atomic": [Branching]})


@program()
def a_leaf_that_uses_its_parameter_at_times():
    def run(self, x):
        k = self.knob(x, x)
        return self.head(self.b(self.a(k) * k) * k)

    knob = Branching(lambda _, h: h * 1.0, lambda self, h: h * self.w)
    return Program(net(run, knob=knob), options={"atomic": [Branching]})


class Noting(nn.Module):
    def forward(self, x):
        self.positive = bool(x.mean() > 0.5)
        return x * 1.0, 2 if self.positive else 3


@program(culprit="knob")
def a_number_of_the_batch_returned_by_a_leaf():
    def run(self, x):
        h, scale = self.knob(x)
        return self.head(self.b(self.a(h) * scale))

    return Program(net(run, knob=Noting()))


class Calling(nn.Module):
    def __call__(self, x):
        return super().__call__(x * 2.0) + 1.0

    def forward(self, x):
        return x.tanh()


@program()
def a_call_of_its_own():
    return Program(net(knobbed, knob=Calling()))


@program(tolerance=1e-6)
def a_loss_that_switches_training():
    def loss(model, batch):
        model.eval()
        with torch.no_grad():
            wanted = model(batch["x"])
        model.train()
        return F.mse_loss(model(batch["x"]), wanted) + square(model, batch)

    return Program(
        net(lambda self, x: self.head(self.norm(self.a(x).tanh())), norm=nn.BatchNorm1d(WIDTH)), loss
    )


@program(culprit="alpha")
def a_parent_that_sets_an_attribute():
    def run(self, x):
        self.knob.alpha = 2.0
        h = self.knob(self.a(x))
        self.knob.alpha = 3.0
        return self.head(self.knob(self.b(h)))

    return Program(net(run, knob=Scale()))


@program()
def flags_of_torchs_own_layers():
    def change(model, step):
        model.knob.negative_slope = 0.1 * step
        model.knob.inplace = step == 1

    return Program(net(knobbed, knob=nn.LeakyReLU()), change=change)


# -- forwards and hooks replaced


@program()
def forwards_replaced_on_instances():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    before = model.b.forward

    @functools.wraps(before)
    def doubled(x):
        return before(x * 2) * 3

    model.b.forward = doubled
    model.c.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 2), model.c)

    def change(model, step):
        if step:
            model.a.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 2), model.a)

    return Program(model, change=change)


@program(culprit="forward")
def a_forward_replaced_on_the_class():
    def change(model, step):
        type(model).forward = (lambda self, x: straight(self, x) * 2) if step else straight

    return Program(net(straight), change=change)


@program()
def a_hook_that_comes_to_a_layer():
    def change(model, step):
        if step:
            model.b.register_forward_hook(lambda module, given, result: result * 2)

    return Program(net(straight), change=change)


@program(culprit="hook")
def a_hook_that_comes_to_a_module_taken_apart():
    def change(model, step):
        if step:
            model.knob.register_forward_hook(lambda module, given, result: result * 2)

    return Program(net(knobbed, knob=Scale()), change=change)


class Tripling(nn.Module):
    def forward(self, x):
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 3)
        return y


@program()
def hooks_on_gradients():
    model = net(
        lambda self, x: self.head(self.act(self.c(self.knob(self.b(self.a(x)))))),
        knob=Tripling(),
        act=nn.Tanh(),
    )
    model.act.register_full_backward_hook(lambda module, given, wanted: (given[0] * 3,))
    return Program(model)


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        (gradient,) = torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)
        return gradient * 1.0


@program()
def a_gradient_inside_a_module():
    torch.manual_seed(1)
    return Program(net(knobbed, knob=Penalised()))


@program(culprit="cannot be recorded|cannot be taken apart")
def functional_calls():
    def loss(model, batch):
        doubled = {name: parameter * 2 for name, parameter in model.named_parameters()}
        return F.mse_loss(torch.func.functional_call(model, doubled, (batch["x"],)), batch["y"])

    return Program(net(straight), loss)


@pytest.mark.parametrize("case", cases.parameters())
def test_a_program_with_state_is_right_or_refused(case):
    case.check()
