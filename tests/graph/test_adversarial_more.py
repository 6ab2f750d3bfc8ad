"""More programs made to be split wrongly: what Python keeps, checkpoints, custom functions, odd tensors."""

import collections
import contextvars
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adversaries import WIDTH, Cases, Program, data, net
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

cases = Cases()
program, forward = cases.program, cases.forward


def straight(self, x):
    return self.head(self.c(self.b(self.a(x))))


# -- memory


@forward()
def a_batch_tensor_written_through_data_after_its_last_use(self, x):
    y = self.b(self.a(x))
    x.data.zero_()
    return self.head(self.c(y))


@forward()
def a_batch_tensor_written_through_data_and_used_again(self, x):
    y = self.b(self.a(x))
    x.data.mul_(2)
    return self.head(self.c(y) * x)


@program(culprit="buffer scale")
def a_buffer_written_through_data_and_used():
    def run(self, x):
        self.scale.data.mul_(1.5)
        return self.head(self.c(self.b(self.a(x) * self.scale[:])))

    return Program(net(run, scale=torch.ones(WIDTH)))


@program()
def a_buffer_written_through_data_and_used_without_gradient():
    def run(self, x):
        self.scale.data.mul_(1.5)
        h = self.b(self.a(x))
        nearest = (h * self.scale).argmax(1, keepdim=True)
        return self.head(self.c(h * self.scale.clone())) * nearest

    return Program(net(run, scale=torch.ones(WIDTH)))


@program(culprit="microbatch 0")
def columns_of_one_tensor_of_which_one_is_changed_in_the_next():
    def run(self, x):
        x[:, 1:].mul_(2)
        return self.head(self.c(self.b(self.a(x))))

    def batch(step):
        items = data(step, items=2)
        wide = torch.cat([items[0]["x"], items[1]["x"]], 1)
        items[0]["x"], items[1]["x"] = wide[:, :WIDTH], wide[:, WIDTH - 1 : -1]
        return items

    return Program(net(run), batch=batch)


@program()
def columns_of_one_tensor_that_lie_apart():
    def run(self, x):
        x.mul_(2)
        return self.head(self.c(self.b(self.a(x))))

    def batch(step):
        items = data(step, items=2)
        wide = torch.cat([items[0]["x"], items[1]["x"]], 1)
        items[0]["x"], items[1]["x"] = wide[:, :WIDTH], wide[:, WIDTH:]
        return items

    return Program(net(run), batch=batch)


@forward()
def an_expanded_tensor_changed_through_its_base(self, x):
    h = self.a(x) * 1.0
    base = h.sum(0, keepdim=True) * 1.0
    wide = base.expand(2, WIDTH)
    y = self.b(h)
    base.mul_(2)
    return self.head(self.c(wide * y) + wide)


@forward()
def an_empty_tensor_across_cuts(self, x):
    nothing = self.a(x)[:, :0]
    h = self.c(torch.cat([self.b(x), nothing], 1))
    return self.head(h) + nothing.sum()


@forward()
def complex_activations_across_cuts(self, x):
    z = torch.fft.fft(self.a(x))
    z = z * torch.polar(torch.ones(2, WIDTH), self.b(x))
    return self.head(self.c(z.real) + z.conj().imag)


@forward()
def rows_and_columns_of_a_received_value_changed(self, x):
    h = self.a(x) * 1.0
    y = self.b(x)
    h[:, 0] = y[:, 0]
    z = self.c(y)
    h[0] += z[0]
    return self.head(h)


@forward()
def sums_put_into_rows(self, x):
    rows = torch.zeros(3, WIDTH)
    rows.index_add_(0, torch.tensor([0, 2]), self.a(x))
    rows.index_put_((torch.tensor([1, 1]),), self.b(x), accumulate=True)
    return self.head(self.c(rows[:2]) + rows[1:])


@forward()
def a_scalar_of_a_wider_type(self, x):
    wide = self.a(x).double().mean()
    h = self.b(x) * wide
    return self.head(self.c(h) * wide.to(h.dtype))


# -- what Python keeps


class Last(nn.Module):
    """Leaves a tensor behind, which another kind of call reads, or only asks for."""

    last: torch.Tensor | None = None

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, h, x, keep):
        if keep:
            self.last = x * 2
            return h
        return h if self.last is None else self.use(h, self.last)


class Seen(nn.Module):
    seen = False

    def forward(self, h, x, keep):
        self.seen = self.seen or keep
        return h * 2 if self.seen and not keep else h


def two_kinds(knob, first):
    """Two kinds of microbatches, told apart by a plain value: `first` that of the first."""

    def run(self, x, keep):
        return self.head(self.c(self.knob(self.b(self.a(x)), x, keep)))

    def batch(step):
        items = data(step)
        for number, item in enumerate(items):
            item["keep"] = first if number % 2 == 0 else not first
        return items

    def loss(model, item):
        return F.mse_loss(model(item["x"], item["keep"]), item["y"])

    return Program(net(run, knob=knob), loss, batch)


for order in (True, False):
    kinds = {
        "reads": lambda order=order: two_kinds(Last(torch.add), order),
        "asks for": lambda order=order: two_kinds(Last(lambda h, last: h * 2), order),
        "sees a flag of": lambda order=order: two_kinds(Seen(), order),
    }
    for verb, build in kinds.items():
        build.__name__ = f"a kind that {verb} another, which is {'first' if order else 'second'}"
        program(culprit="knob.last|knob.seen")(build)


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.last = x * 2
        return self.layer(x)


@program()
def a_tensor_that_is_kept_and_never_read():
    torch.manual_seed(1)
    return Program(net(lambda self, x: self.head(self.c(self.knob(self.b(x)))), knob=Keeping()))


class Lengths(nn.Module):
    """A table that grows with the longest input, as rotary embeddings keep one."""

    def __init__(self):
        super().__init__()
        self.length, self.table = 0, None

    def forward(self, h):
        if len(h) > self.length:
            self.length, self.table = len(h), torch.arange(len(h)).float().cos()[:, None]
        return h * self.table[: len(h)]


@program()
def a_table_that_grows():
    def batch(step):
        return data(step, rows=2, items=1) + data(step, rows=3 + step, items=2)

    model = net(lambda self, x: self.head(self.c(self.knob(self.b(self.a(x))))), knob=Lengths())
    return Program(model, batch=batch)


RATE = contextvars.ContextVar("RATE", default=1.0)


@program()
def a_context_variable():
    def change(model, step):
        RATE.set(1.0 + step)

    return Program(net(lambda self, x: straight(self, x) * RATE.get()), change=change)


class Settings:
    """Plain, behind a property, and behind `__getattr__`."""

    def __init__(self):
        self.inside, self.others = 1.0, {"other": 1.0}

    @property
    def rate(self):
        return self.inside * 2

    def __getattr__(self, name):
        return self.__dict__["others"][name]


@program()
def a_property_of_an_object():
    model = net(lambda self, x: straight(self, x) * self.settings.rate, settings=Settings())

    def change(model, step):
        model.settings.inside = 1.0 + step

    return Program(model, change=change)


@program()
def an_attribute_that_an_object_makes_up():
    model = net(lambda self, x: straight(self, x) * self.settings.other, settings=Settings())

    def change(model, step):
        model.settings.others["other"] = 1.0 + step

    return Program(model, change=change)


class Link:
    following: Any = None
    rate = 1.0


@program()
def a_value_many_objects_away():
    def last(link):
        return link if link.following is None else last(link.following)

    model = net(lambda self, x: straight(self, x) * last(self.chain).rate, chain=Link())
    for _ in range(6):
        last(model.chain).following = Link()

    def change(model, step):
        last(model.chain).rate = 1.0 + step

    return Program(model, change=change)


@program()
def a_tuple_with_names_that_is_replaced():
    kind = collections.namedtuple("Setting", "rate")

    def change(model, step):
        model.setting = kind(1.0 + step)

    return Program(net(lambda self, x: straight(self, x) * self.setting.rate), change=change)


@program(culprit="defaults")
def a_default_that_is_changed():
    def run(self, x, seen=[]):  # noqa: B006 (the way is the point)
        seen.append(len(x))
        return straight(self, x) * len(seen)

    return Program(net(run))


@program()
def a_forward_replaced_between_steps():
    def change(model, step):
        if step:
            model.b.forward = lambda x: F.linear(x, model.b.weight) * 2

    return Program(net(straight), change=change)


@forward(culprit="apply_")
def numbers_handed_to_a_python_function(self, x):
    seen = []
    x.clone().apply_(lambda number: seen.append(number) or number)
    return straight(self, x) * (1 + sum(seen))


@program(culprit="apply_")
def numbers_handed_to_a_python_function_by_the_loss():
    def loss(model, item):
        seen = []
        item["x"].clone().apply_(lambda number: seen.append(number) or number)
        return F.mse_loss(model(item["x"]), item["y"]) * (1 + sum(seen))

    return Program(net(straight), loss)


# -- checkpoints


@forward()
def a_checkpoint_that_changes_what_it_made(self, x):
    def part(h):
        k = self.b(h) * 1.0
        y = self.c(h)
        k.mul_(2)
        return self.c(k) * y

    return self.head(checkpoint(part, self.a(x), use_reentrant=False))


@forward(culprit="autocast")
def a_checkpoint_that_changes_what_it_made_outside_of_autocast(self, x):
    def part(h):
        k = self.b(h) * 1.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            k.mul_(2)
            y = self.c(k)
        return y.float()

    return self.head(checkpoint(part, self.a(x), use_reentrant=False))


@forward()
def autocast_in_a_checkpoint(self, x):
    def part(h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(h).float().tanh()

    return self.head(self.c(checkpoint(part, self.a(x), use_reentrant=False)))


@forward()
def a_checkpoint_in_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = checkpoint(lambda h: self.b(h).tanh(), self.a(x), use_reentrant=False)
        h = self.c(h)
    return self.head(h.float())


@forward()
def a_checkpoint_in_a_checkpoint(self, x):
    def inner(h):
        return self.b(h).tanh()

    def outer(h):
        return self.c(checkpoint(inner, self.a(h), use_reentrant=False))

    return self.head(checkpoint(outer, x, use_reentrant=False))


@forward()
def a_checkpoint_that_returns_a_value_and_a_view_of_it(self, x):
    def part(h):
        k = self.b(h).tanh()
        return k, k[:, :2]

    k, left = checkpoint(part, self.a(x), use_reentrant=False)
    return self.head(self.c(k) + torch.cat([left, left], 1))


# -- custom functions, hooks, parametrizations


class Scale(torch.autograd.Function):
    """Keeps its settings for the backward, which looks at them again."""

    @staticmethod
    def forward(ctx, x, settings):
        ctx.settings = settings
        return x * settings["rate"]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.settings["rate"], None


@forward()
def settings_of_a_custom_function(self, x):
    h = Scale.apply(self.a(x), {"rate": 3.0})
    return self.head(self.c(Scale.apply(self.b(h), {"rate": 0.5})))


@forward(culprit="Scale.apply")
def settings_of_a_custom_function_changed_before_its_backward(self, x):
    settings = {"rate": 3.0}
    h = Scale.apply(self.a(x), settings)
    settings["rate"] = 5.0
    return self.head(self.c(self.b(h)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.data.mul_(2)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@forward()
def a_custom_function_that_writes_in_secret(self, x):
    h = self.a(x) * 1.0
    y = self.b(h)
    k = Doubled.apply(h)
    return self.head(self.c(k) + y + h)


@program()
def hooks_that_change_what_goes_through():
    model = net(straight)
    model.a.register_forward_hook(lambda module, args, output: output.mul_(2))
    model.c.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.b.register_full_backward_hook(lambda module, into, out: (into[0] * 2,))
    model.c.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))
    return Program(model)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


@program(tolerance=1e-6)
def parametrized_weights_that_are_tied():
    model = net(straight)
    model.c.weight = model.a.weight
    for layer in (model.a, model.b):
        nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return Program(model)


@program(tolerance=1e-6)
def a_parametrized_weight_kept_between_uses():
    def run(self, x):
        with nn.utils.parametrize.cached():
            return self.head(self.c(self.b(self.b(self.a(x)))))

    model = net(run)
    nn.utils.parametrize.register_parametrization(model.b, "weight", Symmetric())
    return Program(model)


@program(tolerance=1e-6)
def a_tied_weight_under_both_gradient_modes():
    def run(self, x):
        h = self.a(x)
        with torch.no_grad():
            t = self.c(h)
        return self.head(self.b(self.c(h * t)))

    model = net(run)
    model.c.weight = model.a.weight
    return Program(model)


@program(tolerance=1e-6)
def a_model_called_several_times_by_the_loss():
    def loss(model, item):
        x = item["x"]
        return F.mse_loss(model(x), item["y"]) + 0.1 * (model(x * 2) - model(x).detach()).pow(2).mean()

    return Program(net(straight), loss)


@program()
def modules_under_names_that_are_computed():
    def run(self, x):
        for number in range(3):
            x = functools.partial(self.parts[f"p{number * 2 % 3}"])(x).tanh()
        return self.head(x)

    torch.manual_seed(1)
    return Program(net(run, parts=nn.ModuleDict({f"p{n}": nn.Linear(WIDTH, WIDTH) for n in range(3)})))


@dataclass
class Twice:
    one: torch.Tensor
    other: torch.Tensor


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.layer(x)
        return Twice(h, h)


@program()
def a_dataclass_that_holds_one_tensor_twice():
    torch.manual_seed(1)

    def run(self, x):
        twice = self.knob(self.a(x))
        twice.one.mul_(2)
        return self.head(self.c(twice.other + self.b(twice.one)))

    return Program(net(run, knob=Doubling()))


@program(culprit="it sets requires_grad")
def a_gradient_asked_of_a_batch_tensor():
    def loss(model, batch):
        x = batch["x"].clone()
        x.requires_grad = True
        steepest = torch.autograd.grad(F.mse_loss(model(x), batch["y"]), x)[0]
        return F.mse_loss(model(x.detach() + 0.1 * steepest.sign()), batch["y"])

    return Program(net(straight), loss=loss)


# -- buffers that a backward reads once more


class Scaling(torch.autograd.Function):
    """Keeps what it is given in an attribute, where autograd does not see it."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        return x * k

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.k, None


@program(culprit="reads the buffer scale")
def a_checkpoint_that_reads_a_buffer_which_changes_later():
    def run(self, x):
        h = checkpoint(lambda h: self.b(h) * self.scale, self.a(x), use_reentrant=False)
        with torch.no_grad():
            self.scale.mul_(0.5)
        return self.head(self.c(h))

    return Program(net(run, scale=torch.full((1,), 1.5)))


@program(culprit="reads the buffer scale|not taken apart")
def a_reentrant_checkpoint_that_reads_a_buffer_which_changes_later():
    def run(self, x):
        h = checkpoint(lambda h: self.b(h) * self.scale, self.a(x), use_reentrant=True)
        with torch.no_grad():
            self.scale.mul_(0.5)
        return self.head(self.c(h))

    return Program(net(run, scale=torch.full((1,), 1.5)))


@program()
def a_checkpoint_that_reads_a_copy_of_a_buffer():
    def run(self, x):
        with torch.no_grad():
            self.scale.mul_(0.5)
        scale = self.scale.clone()
        h = checkpoint(lambda h: self.b(h) * scale, self.a(x), use_reentrant=False)
        return self.head(self.c(h))

    return Program(net(run, scale=torch.full((1,), 1.5)))


@program(culprit="is given the buffer scale")
def a_custom_function_that_keeps_a_buffer_which_changes_later():
    def run(self, x):
        h = Scaling.apply(self.a(x), self.scale)
        with torch.no_grad():
            self.scale.mul_(0.5)
        return self.head(self.c(self.b(h)))

    return Program(net(run, scale=torch.full((1,), 1.5)))


@program()
def a_class_put_in_place_between_steps():
    class Act:
        boost = 2.0

        def __call__(self, h):
            return h * self.boost

    class Other:
        def __init__(self):
            self.more = 3.0

        def __call__(self, h):
            return h * self.more

    def change(model, step):
        if step == 1:
            model.act = Other()
        elif step == 2:
            model.act.more = 7.0

    def run(self, x):
        return self.head(self.c(self.b(self.act(self.a(x)))))

    return Program(net(run, act=Act()), change=change, steps=3)


@program()
def the_last_of_many_objects_changes():
    class First:
        def __call__(self, h):
            return h

    class Last:
        factor = 1.0

        def __call__(self, h):
            return h * self.factor

    def change(model, step):
        model.acts[-1].factor = 1.0 + step

    def run(self, x):
        h = self.a(x)
        for act in self.acts:
            h = act(h)
        return self.head(self.c(self.b(h)))

    return Program(net(run, acts=[First() for _ in range(150)] + [Last()]), change=change)


@program()
def a_buffer_of_complex_numbers_and_its_conjugate():
    def run(self, x):
        h = torch.view_as_real(torch.view_as_complex(self.a(x).reshape(-1, 2)) * self.phase.conj())
        self.phase.data.mul_(1j)
        return self.head(self.c(self.b(h.reshape(x.shape))))

    return Program(net(run, phase=torch.tensor(0.6 + 0.8j)))


class OneOrTwo(nn.Module):
    """Returns as many tensors as its numbers say."""

    def forward(self, x):
        return [x] if float(x.detach().sum()) > 0 else [x, x]


@program(culprit="returned [12] values, and [12] when it was recorded")
def a_module_that_returns_as_many_tensors_as_its_numbers_say():
    def run(self, x):
        return self.head(self.c(torch.stack(self.some(self.a(x) * 0 + x)).sum(0)))

    return Program(net(run, some=OneOrTwo()), options={"atomic": [OneOrTwo]})


@forward()
def a_function_with_an_empty_cell_is_handed_to_vmap(self, x):
    def scaled(row):
        return row * 2 if True else later

    h = torch.vmap(scaled)(self.a(x))
    if self is None:
        later = 1
    return self.head(self.c(self.b(h)))


@pytest.mark.parametrize("case", cases.parameters())
def test_a_program_that_hides_something_is_right_or_refused(case):
    case.check()
