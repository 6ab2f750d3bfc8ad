"""Programs made to be split wrongly: aliases, changes in place, numbers that reach Python by back doors."""

import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from adversaries import WIDTH, Cases, Program, data, net
from torch import nn
from torch.nn import functional as F

cases = Cases()
program, forward = cases.program, cases.forward


# -- aliases


@forward()
def overlapping_slices(self, x):
    h = self.a(x) * 1.0
    left, right = h[:, :3], h[:, 1:]
    y = self.b(x)
    left.mul_(2)
    z = self.c(y)
    right.add_(z[:, 1:])
    return self.head(h + z)


@forward()
def expanded(self, x):
    h = self.a(x).sum(0, keepdim=True).expand(2, WIDTH)
    return self.head(self.c(self.b(h)) * h)


@forward()
def strided_onto_itself(self, x):
    h = self.a(x) * 1.0
    windows = h.as_strided((3, 4), (2, 1))
    y = self.b(windows)
    return self.head(self.c(h) * windows[1:] + y[:2])


@forward()
def strided_and_changed(self, x):
    h = self.a(x) * 1.0
    corner = h.as_strided((2, 2), (4, 1), 2)
    y = self.b(x)
    corner.mul_(3)
    return self.head(self.c(h) + y)


@forward()
def unfolded(self, x):
    h = self.a(x) * 1.0
    windows = h.unfold(1, 2, 1)
    y = self.b(h)
    return self.head(self.c(y) * windows.sum((1, 2))[:, None])


@forward()
def transposed_and_changed(self, x):
    h = self.a(x) * 1.0
    turned = h.T
    y = self.b(h.clone())
    turned[0] = 1.0
    return self.head(self.c(h) + y)


@forward()
def written_through_data(self, x):
    h = self.a(x)
    y = self.b(h * 1.0)
    h.data.mul_(2)
    return self.head(self.c(h) + y)


@forward()
def written_through_data_after_the_last_use(self, x):
    h = self.a(x) * 1.0
    y = self.b(h)
    h.data.zero_()
    return self.head(self.c(y))


@forward()
def data_assigned(self, x):
    h = self.a(x) * 1.0
    y = self.b(x)
    h.data += 1
    return self.head(self.c(h) + y)


@forward()
def detached_and_changed(self, x):
    h = self.a(x) * 1.0
    shared = h.detach()
    y = self.b(h * 1.0)
    shared.add_(1.0)
    return self.head(self.c(h) + y + shared)


@forward()
def unbound_rows_changed(self, x):
    h = self.a(x) * 1.0
    with torch.no_grad():
        for number, row in enumerate(h.unbind(0)):
            row.mul_(number + 1)
    return self.head(self.c(self.b(h)))


@forward()
def chunks_changed(self, x):
    h = self.a(x) * 1.0
    left, right = h.chunk(2, 1)
    try:
        left.add_(1)
    except RuntimeError:  # autograd does not allow it
        left = left + 1
    return self.head(self.c(self.b(torch.cat([left, right], 1)) + h))


@forward()
def complex_views(self, x):
    z = torch.view_as_complex(self.a(x).view(2, 2, 2).contiguous())
    y = self.b(x)
    return self.head(self.c(torch.view_as_real(z * z.conj()).flatten(1)) + y + z.real.sum())


@forward()
def an_imaginary_part_changed(self, x):
    z = torch.complex(self.a(x)[:, :2], self.b(x)[:, :2])
    part, before = z.imag, z * 2
    y = self.c(x)
    part.mul_(3)
    return self.head(torch.view_as_real(z).flatten(1) + y) + before.real.sum()


@forward()
def out_arguments(self, x):
    c = torch.empty(0)
    torch.add(x, x, out=c)
    top, at = torch.empty(2), torch.empty(2, dtype=torch.long)
    torch.max(x, 1, out=(top, at))
    h = self.b(self.a(x) * c)
    return self.head(self.c(h * top[:, None]) * at[:, None])


@forward()
def memory_taken_over(self, x):
    taken, given = torch.empty(0), torch.zeros(2, WIDTH)
    taken.set_(x * 2)
    given.data = x * 2
    return self.head(self.c(self.b(self.a(x) * taken) * given))


@forward()
def copied_put_and_scattered(self, x):
    h = self.a(x) * 1.0
    t = torch.zeros(2, WIDTH)
    t.copy_(h)
    y = self.b(t)
    other = t.clone()
    other.index_put_((torch.tensor([0]),), y[:1])
    other.scatter_(1, torch.zeros(2, 1, dtype=torch.long), x[:, :1])
    return self.head(self.c(other) + t)


@forward()
def lists_changed_at_once(self, x):
    both = [torch.zeros(WIDTH), torch.ones(WIDTH)]
    torch._foreach_add_(both, 2.0)
    h = self.a(x) * both[0].clone()
    torch._foreach_mul_(both, 3.0)
    return self.head(self.c(self.b(h) * both[1]))


@forward()
def reshaped_once_a_copy_once_a_view(self, x):
    h = self.a(x) * 1.0
    copy, view = h.T.reshape(-1), h.reshape(-1)
    y = self.b(h.clone())
    copy.mul_(2)
    view.mul_(3)
    return self.head(self.c(h) + y + copy.sum())


@forward()
def an_array_over_a_tensor(self, x):
    array = np.zeros(WIDTH, dtype=np.float32)
    mask = torch.from_numpy(array)
    h = self.a(x) * mask
    array[0] = 1.0
    return self.head(self.c(self.b(h) + mask))


@forward()
def values_of_a_sparse_tensor_changed(self, x):
    s = torch.diag(x[0]).to_sparse()
    s._values().mul_(2)
    return self.head(self.c(torch.sparse.mm(s, self.b(self.a(x)).T).T))


@forward(
    culprit="swap_tensors",
)
def swapped_tensors(self, x):
    mask, other = torch.zeros(WIDTH), x[0].clone()
    torch.utils.swap_tensors(mask, other)
    return self.head(self.c(self.b(self.a(x)) * mask))


@program(
    culprit="shares? memory|shares? its memory|alias",
)
def an_alias_from_the_second_step_on():
    def run(self, x, z):
        h = self.b(self.a(x.clone()))
        x.add_(1.0)
        return self.head(self.c(h) * z)

    def batch(step):
        items = data(step)
        for item in items:
            item["z"] = item["x"].view(2, WIDTH) if step else item["x"].clone()
        return items

    return Program(net(run), lambda m, b: F.mse_loss(m(b["x"], b["z"]), b["y"]), batch)


@program(
    culprit="microbatch",
)
def one_tensor_in_two_microbatches_changed():
    def run(self, x):
        x.mul_(2)
        return self.head(self.c(self.b(self.a(x))))

    return Program(net(run), batch=lambda step: [data(step)[0]] * 2)


# -- order of reads and writes, ways of values


@forward()
def read_written_read(self, x):
    h = self.a(x) * 1.0
    y = self.b(h.clone())
    h.add_(y)
    z = self.c(h.clone())
    h.mul_(z.detach())
    return self.head(h + z)


@forward()
def the_batch_read_written_read(self, x):
    y = self.a(x.clone())
    x.add_(1)
    y = self.b(y * x.clone())
    x.mul_(2)
    y = self.c(y * x.clone())
    x.sub_(1)
    return self.head(y * x)


@forward()
def a_condition_used_everywhere(self, x):
    k = self.a(x)
    h = self.b(x) * k + k
    h = self.c(h) * k + k.exp()
    return self.head(h * k) + k.sum()


@forward()
def views_of_a_value_used_everywhere(self, x):
    k = self.a(x)
    v = k.view(2, 2, 2)
    h = self.b(x) * v.flatten(1) + k
    h = self.c(h) * k + v.transpose(1, 2).flatten(1)
    return self.head(h * v.flatten(1) + k)


@forward()
def pieces_of_a_value_used_everywhere(self, x):
    p, q = self.a(x).split(2, 1)
    h = self.b(torch.cat([q, p], 1)) * torch.cat([p, p], 1)
    h = self.c(h) + torch.cat([q, q], 1)
    return self.head(h * torch.cat([p, q], 1))


@forward()
def the_very_same_tensor_returned(self, x):
    h = self.a(x)
    g = h.contiguous()
    y = self.b(g)
    return self.head(self.c(g.to(torch.float32)) + y * h)


@forward()
def detach_tricks(self, x):
    h = self.a(x)
    y = self.b(h + (h.round() - h).detach())
    y = y + (self.c(y) - y).detach()
    return self.head(y * h)


@forward()
def gradients_off_and_on(self, x):
    with torch.no_grad():
        h = self.a(x)
        with torch.enable_grad():
            h = self.b(x) + h
    torch.set_grad_enabled(False)
    k = self.c(x)
    torch.set_grad_enabled(True)
    return self.head(h * k)


@forward()
def integers_as_results(self, x):
    h = self.a(x)
    at = h.detach().argmax(1)
    z = self.c(self.b(h))
    return self.head(z.gather(1, at[:, None]) * z)


@forward()
def no_rows(self, x):
    h = self.a(x)
    return self.head(self.c(torch.cat([h, self.b(h[:0])])))


@forward()
def not_a_number(self, x):
    h = self.a(x) * torch.where(x > 0, torch.inf, 1.0)
    return self.head(self.c(self.b(h / h)))


@forward()
def exceptions_as_control_flow(self, x):
    for layer in (self.a, None, self.b):
        try:
            x = layer(x)
        except TypeError:
            x = x * 2
    return self.head(self.c(x))


@forward(tolerance=1e-6)
def recursion_and_generators(self, x):
    def deeper(h, left):
        return h if left == 0 else deeper(self.b(h).tanh(), left - 1)

    return self.head(sum(layer(x) for layer in (self.a, self.c)) + deeper(x, 2))


@forward()
def a_parameter_in_some_microbatches(self, x):
    h = self.a(x)
    if (x > 0).all():
        h = self.b(h)
    elif (x < 0).all():
        h = self.c(h)
    return self.head(h)


@forward(tolerance=1e-6)
def a_module_called_as_often_as_the_batch_says(self, x):
    h = self.a(x)
    for _ in range(int((x[0] > 0).sum())):
        h = self.b(h).tanh()
    return self.head(self.c(h))


@forward(culprit="inference")
def inference_mode_in_the_middle(self, x):
    with torch.inference_mode():
        t = self.b(x) * 2
    return self.head(self.c(self.a(x)) * t.clone())


@forward(culprit="saved_tensors_hooks")
def saved_tensors_packed(self, x):
    h = self.a(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        h = h * h.exp()
    return self.head(self.c(self.b(h)))


@forward(culprit="sdp|attention")
def an_attention_kernel_chosen(self, x):
    h = self.a(x)
    q = torch.cat([h] * 8)[None, None].repeat(1, 1, 3, 1) * 3
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mixed = F.scaled_dot_product_attention(q, q * 0.3, q.exp())
    return self.head(self.c(self.b(mixed[0, 0, :2])) * mixed.sum())


@forward(tolerance=2**-7)  # across a cut the two uses' gradients add up in float32, not in bfloat16
def a_weight_used_twice_under_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = self.a(x)
        with torch.no_grad():
            ones = h.detach() * 0 + 1
        h = self.a(self.b(h) * ones)
    return self.head(h.float())


@program()
def autocast_between_steps():
    on = [False]

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on[0]):
            found = model(batch["x"])
        return F.mse_loss(found.float(), batch["y"])

    def change(model, step):
        on[0] = step == 1

    return Program(net(lambda self, x: self.head(self.b(self.a(x)))), loss, change=change)


# -- numbers of the batch


def counted(step):
    """Microbatches with whole numbers `n`, whose first and largest differs from one to the next."""
    items = data(step, rows=3)
    for number, item in enumerate(items):
        item["n"] = torch.tensor([1 + (number + step) % 3, 1, 1])
    return items


def scaled_by(scale):
    """Programs whose activations are multiplied by what `scale(n)` says of the whole numbers in the batch."""

    def build():
        def run(self, x, n):
            return self.head(self.c(self.b(self.a(x))) * scale(n))

        return Program(net(run), lambda m, b: F.mse_loss(m(b["x"], b["n"]), b["y"]), counted)

    return build


def assigned(n):
    mask = torch.ones(8)
    mask[n[0] :] = 0.0
    return mask


def padded(n):
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(3, 4, 1), n, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


NUMBERS = {
    "bincount": (lambda n: n.bincount().shape[0], {}),
    "repeat_interleave": (lambda n: torch.ones(3).repeat_interleave(n).shape[0], {}),
    "percent": (lambda n: float("%d" % n[0]), {}),  # noqa: UP031 (the way is the point)
    "min, max, sorted": (lambda n: max(n) + min(n) * float(sorted(n)[1]), {}),
    "math": (lambda n: math.exp(n[0]) * math.floor(n[0] / 2), {}),
    "is_nonzero": (lambda n: 2 if torch.is_nonzero(n[0] - 1) else 3, {}),
    "data.item": (lambda n: n.data[0].item() + n.detach().double().tolist()[0], {}),
    "any of items": (lambda n: 3.0 if any(v.item() > 2 for v in n) else 1.0, {}),
    "a key": (lambda n: {1: 1.0, 2: 5.0, 3: 7.0}[int(n[0])], {}),
    "numpy": (lambda n: float(np.asarray(n).max()), {"culprit": "__array__"}),
    "arange": (
        lambda n: torch.arange(n.max()).shape[0],
        {
            "culprit": "arange",
        },
    ),
    "arange iterated": (
        lambda n: sum(1 for _ in torch.arange(n.max())),
        {
            "culprit": "arange",
        },
    ),
    "one_hot": (
        lambda n: F.one_hot(n).shape[1],
        {
            "culprit": "one_hot",
        },
    ),
    "zeros": (
        lambda n: len(torch.zeros(n.max())),
        {
            "culprit": "zeros",
        },
    ),
    "tensor_split": (
        lambda n: torch.tensor_split(torch.ones(5), n[:1])[0].shape[0],
        {
            "culprit": "tensor_split",
        },
    ),
    "a slice": (
        lambda n: torch.arange(5.0)[: n.max()].sum(),
        {
            "culprit": "slice|getitem",
        },
    ),
    "a slice's shape": (
        lambda n: torch.ones(5)[: n.max()].shape[0],
        {
            "culprit": "slice|getitem",
        },
    ),
    "a slice assigned": (
        lambda n: assigned(n).sum(),
        {
            "culprit": "slice|setitem",
        },
    ),
    "padded rows": (
        lambda n: padded(n).shape[1],
        {
            "culprit": "pad_packed",
        },
    ),
    "f-string": (
        lambda n: float(f"{n[0]}"),
        {
            "culprit": "__format__",
        },
    ),
    "repr": (
        lambda n: {"1": 1.0, "2": 5.0, "3": 7.0}[repr(n)[8]],
        {
            "culprit": "__repr__",
        },
    ),
    "pickle": (lambda n: sum(pickle.dumps(n)) % 7, {"culprit": "untyped_storage"}),
}
for name, (scale, options) in NUMBERS.items():
    build = scaled_by(scale)
    build.__name__ = f"number by {name}"
    program(**options)(build)


@forward(culprit="_version")
def the_version_of_a_tensor(self, x):
    x.add_(1)
    return self.head(self.c(self.b(self.a(x.clone()) * x._version)))


@program(
    culprit="LinAlgError|cholesky",
)
def an_exception_that_depends_on_numbers():
    def run(self, x):
        h = self.a(x)
        try:
            h = h * torch.linalg.cholesky(torch.diag(x[0])).sum()
        except torch.linalg.LinAlgError:
            h = h * 0.5
        return self.head(self.c(self.b(h)))

    return Program(net(run), batch=lambda step: data(step)[1::-1])


@program(
    culprit="IndexError|getitem",
)
def an_exception_that_comes_later():
    def run(self, x, n):
        h = self.a(x)
        try:
            h = h + torch.arange(3.0)[n].sum()
        except IndexError:
            h = h * 0.5
        return self.head(self.c(self.b(h)))

    return Program(net(run), lambda m, b: F.mse_loss(m(b["x"], b["n"]), b["y"]), counted)


@forward(culprit="grad")
def a_branch_on_a_gradient(self, x):
    h = self.a(x)
    return self.head(self.c(self.b(h * 2 if self.b.weight.grad is not None else h)))


@program(culprit="grad")
def a_loss_weighted_by_the_norm_of_gradients():
    def loss(model, batch):
        norms = sum(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)
        return F.mse_loss(model(batch["x"]), batch["y"]) * (1 + norms)

    return Program(net(lambda self, x: self.head(self.b(self.a(x)))), loss)


@program(culprit="weight")
def an_attribute_on_a_parameter():
    model = net(lambda self, x: self.head(self.b(self.a(x)) * getattr(self.b.weight, "alpha", 1.0)))
    model.b.weight.alpha = 3.0
    return Program(model)


@program(culprit="batch")
def an_attribute_on_a_batch_tensor():
    def batch(step):
        items = data(step)
        for item in items:
            item["x"].alpha = 2.0 + step
        return items

    return Program(net(lambda self, x: self.head(self.b(self.a(x)) * getattr(x, "alpha", 1.0))), batch=batch)


class Quantised(nn.Parameter):
    pass


@program(culprit="b.weight|Quantised")
def a_parameter_of_a_class_of_its_own():
    def run(self, x):
        return self.head(self.c(self.b(self.a(x)) * (2 if isinstance(self.b.weight, Quantised) else 1)))

    model = net(run)
    model.b.weight = Quantised(model.b.weight.data)
    return Program(model)


@forward()
def a_partial_with_a_tensor(self, x):
    twice = functools.partial(torch.mul, x)
    return self.head(self.c(self.b(twice(self.a(x)))))


# -- parameters


@program(tolerance=1e-6)
def one_parameter_in_three_modules():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    model.c.weight = model.b.weight = model.a.weight
    return Program(model)


@program(tolerance=1e-6)
def one_module_under_two_names():
    model = net(lambda self, x: self.head(self.d(self.b(self.c(x)))))
    model.d = model.c
    return Program(model)


@program(culprit="two parameters in one memory", tolerance=1e-6)
def a_parameter_that_is_a_view_of_another():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))) * self.row.sum())
    model.row = nn.Parameter(model.a.weight.data[0])
    model.c.weight = nn.Parameter(model.b.weight.data.T)
    return Program(model)


@program(
    tolerance=1e-6,
    culprit="memory|tied|share",
)
def two_parameters_over_one_memory():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    model.c.weight = nn.Parameter(model.a.weight.data)
    return Program(model)


@program(culprit="hook", tolerance=1e-6)
def a_shared_parameter_with_a_hook():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    model.c.weight = model.a.weight
    model.a.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return Program(model)


@program()
def a_parameter_with_a_hook():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    model.a.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return Program(model)


@program()
def frozen_for_one_step():
    def change(model, step):
        model.b.requires_grad_(step != 1)

    return Program(net(lambda self, x: self.head(self.c(self.b(self.a(x))))), change=change)


@program(
    culprit="requires_grad|frozen",
    tolerance=1e-6,
)
def a_shared_parameter_frozen_for_one_step():
    def change(model, step):
        model.a.weight.requires_grad_(step != 1)

    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    model.c.weight = model.a.weight
    return Program(model, change=change)


@program(culprit="requires_grad|frozen")
def a_branch_on_requires_grad():
    def run(self, x):
        h = self.a(x)
        return self.head(self.b(h * 2 if self.b.weight.requires_grad else h))

    def change(model, step):
        model.b.requires_grad_(step != 1)

    return Program(net(run), change=change)


@program()
def gradients_of_sparse_embeddings():
    def run(self, x):
        return self.head(self.b(self.rows((x[:, 0] * 3).long() % 5)))

    torch.manual_seed(1)
    return Program(net(run, rows=nn.Embedding(5, WIDTH, sparse=True)))


@program()
def complex_and_half_parameters():
    def run(self, x):
        return self.head(self.b(self.a(x).bfloat16()).float() * (self.z * self.z.conj()).real)

    model = net(run)
    model.b.bfloat16()
    model.z = nn.Parameter(torch.complex(torch.ones(WIDTH), torch.arange(4.0)))
    return Program(model)


@program()
def parametrizations():
    model = net(lambda self, x: self.head(self.c(self.b(self.a(x)))))
    nn.utils.parametrizations.weight_norm(model.b)
    nn.utils.parametrizations.orthogonal(model.c)
    nn.utils.spectral_norm(model.a)
    return Program(model)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.w


@program(culprit="is another one than when")
def parameters_assigned_between_steps():
    def change(model, step):
        if step == 1:
            model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)

    return Program(net(lambda self, x: self.head(self.knob(self.b(self.a(x)))), knob=Own()), change=change)


@program(culprit="b")
def a_layer_replaced_between_steps():
    def change(model, step):
        if step == 1:
            torch.manual_seed(7)
            model.b = nn.Linear(WIDTH, WIDTH)

    return Program(net(lambda self, x: self.head(self.c(self.b(self.a(x))))), change=change)


@program(culprit="bias")
def a_bias_removed_between_steps():
    def change(model, step):
        if step == 1:
            model.b.bias = None

    def run(self, x):
        return self.head(F.linear(self.a(x), self.b.weight, self.b.bias))

    return Program(net(run), change=change)


class Making(nn.Module):
    def forward(self, x):
        if not hasattr(self, "w"):
            self.w = nn.Parameter(torch.ones(WIDTH))
        return x * self.w


@program(culprit="knob")
def a_parameter_made_by_a_forward():
    return Program(net(lambda self, x: self.head(self.b(self.knob(self.a(x)))), knob=Making()))


# -- random numbers


@program(drawing=True)
def draws_in_the_loss():
    def loss(model, batch):
        noise = torch.rand_like(batch["y"]) + torch.randperm(2)[:, None] + torch.normal(0.0, 1.0, (2, 1))
        noise = (
            noise + torch.multinomial(torch.ones(2), 2)[:, None] + torch.bernoulli(torch.full((2, 1), 0.5))
        )
        return F.mse_loss(model(batch["x"] * F.dropout(torch.ones(WIDTH), 0.5)), batch["y"] + noise)

    return Program(net(lambda self, x: self.head(self.b(self.a(x)))), loss)


@forward(drawing=True)
def draws_in_place(self, x):
    h = self.b(self.a(x))
    noise = torch.empty(WIDTH).uniform_()
    noise.normal_().exponential_()
    h = h.clone().bernoulli_(0.5) * h + noise
    return self.head(self.c(F.gumbel_softmax(h) + F.rrelu(h, training=True)))


class Sometimes(nn.Module):
    """Draws once or twice, as the batch says."""

    def forward(self, x, given):
        x = F.dropout(x, 0.5)
        return F.dropout(x, 0.5) if given.mean() < 0 else x


@program(drawing=True)
def as_many_draws_as_the_batch_says():
    return Program(net(lambda self, x: self.head(self.c(self.knob(self.b(self.a(x)), x))), knob=Sometimes()))


class Lucky(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x * torch.rand(WIDTH, generator=self.generator)


@program()
def a_generator_of_the_modules_own():
    return Program(net(lambda self, x: self.head(self.c(self.knob(self.b(self.a(x))))), knob=Lucky()))


@forward(culprit="manual_seed")
def seeded_in_the_forward(self, x):
    torch.manual_seed(7)
    return self.head(self.c(self.b(self.a(x)) + torch.rand(WIDTH)))


@forward(culprit="manual_seed|fork_rng")
def seeded_in_a_fork(self, x):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise = torch.rand(WIDTH)
    return self.head(self.c(self.b(self.a(x)) + noise))


@program(
    drawing=True,
    culprit="knob",
)
def dropout_switched_on_between_steps():
    def change(model, step):
        model.knob.p = 0.5 if step else 0.0
        torch.manual_seed(next(seeds))  # which must not matter

    return Program(
        net(lambda self, x: self.head(self.knob(self.b(self.a(x)))), knob=nn.Dropout(0.0)), change=change
    )


seeds = itertools.count()


@pytest.mark.parametrize("case", cases.parameters())
def test_a_hostile_program_is_right_or_refused(case):
    case.check()
