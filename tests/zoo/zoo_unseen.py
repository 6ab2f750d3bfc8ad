"""Tensors from what skips `__torch_function__`: transforms, scripts, custom functions, checkpoints."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from zoo_checks import WIDTH, Zoo
from zoo_inplace import Layers

ZOO = Zoo()
NOT_APART = "the model was not taken apart: "
CAPTURING = NOT_APART + "it hands vmap a function that uses more than its arguments"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class Stack(nn.Module):
    """Four blocks of a kind, and a head."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(4))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def linear_and(*after):
    """A block of one linear layer and what follows it."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *after)


def tanh_block():
    return linear_and(nn.Tanh())


@ZOO.model()
def vmap_in_blocks():
    class Inner(Block):
        def forward(self, x):
            pairs = torch.vmap(torch.outer)(self.norm(x), self.layer(x))
            return x + pairs.mean(-1)

    return Stack(Inner)


@ZOO.model()
def vmap_over_parameters():
    class Inner(Block):
        def forward(self, x):
            return torch.vmap(lambda row: F.linear(row, self.layer.weight, self.layer.bias))(x).tanh()

    return Stack(Inner)


@ZOO.model()
def vmap_in_the_model():
    class Model(Layers):
        def forward(self, x):
            h = self.b(self.a(x))
            h = torch.vmap(lambda row: row * row.sum())(h)
            return self.head(self.d(self.c(h)))

    return Model()


@ZOO.model(refused=CAPTURING)
class VmapCapturesAnActivation(Layers):
    """The tensor that the closure holds is among the arguments too."""

    def forward(self, x):
        h = self.b(self.a(x))
        h = torch.vmap(lambda row: row * h.mean())(h)
        return self.head(self.d(self.c(h)))


SCALES = torch.linspace(0.5, 2.0, WIDTH)


@ZOO.model(refused=CAPTURING)
class VmapUsesAGlobalTensor(Layers):
    def forward(self, x):
        h = torch.vmap(lambda row: row * SCALES)(self.b(self.a(x)))
        return self.head(self.d(self.c(h)))


@ZOO.model(refused=CAPTURING)
class VmapHoldsAModule(Layers):
    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        h = torch.vmap(lambda row: row * self.scale)(self.b(self.a(x)))
        return self.head(self.d(self.c(h)))


@ZOO.model(refused=NOT_APART + "random numbers are drawn inside vmap")
class VmapDraws(Layers):
    def forward(self, x):
        noisy = torch.vmap(lambda row: row + torch.randn_like(row), randomness="different")
        return self.head(self.d(self.c(noisy(self.b(self.a(x))))))


@ZOO.model()
class VmapWithConstants(Layers):
    """Tensors that the function makes itself, and a number from outside."""

    def forward(self, x):
        half, n = torch.tensor, len(x)

        def mapped(row, factor=1.5):
            return (row * n - half([0.5] * WIDTH) + torch.arange(WIDTH)) * factor / 3

        h = torch.vmap(mapped)(self.b(self.a(x)))
        return self.head(self.d(self.c(h)))


@ZOO.model()
class GradientsOfRows(Layers):
    """Transforms in transforms, at the outermost level."""

    def forward(self, x):
        def energy(row, place):
            return (row * place).sin().sum()

        h = self.b(self.a(x))
        h = h - torch.vmap(torch.func.grad(energy))(h, x)
        h = self.c(h) + torch.func.grad(lambda all_rows: all_rows.cos().sum())(h)
        return self.head(self.d(h) + torch.vmap(torch.func.jacrev(torch.sin))(h).sum(1))


def vmap_loss(model, batch):
    return torch.vmap(lambda one, other: (one - other).square().sum())(model(batch["x"]), batch["y"]).mean()


@ZOO.model(loss=vmap_loss)
def vmap_in_the_loss():
    return Stack(tanh_block)


@ZOO.model()
def vmapped_mask_of_the_batch():
    """A mask made by vmap from the batch alone, used by every block (as transformers do)."""

    class Inner(Block):
        def forward(self, x, mask):
            return x + self.layer(self.norm(x)) * mask

    class Model(Stack):
        def forward(self, x):
            mask = torch.vmap(lambda row: (row > row.mean()).float())(x)
            for block in self.blocks:
                x = block(x, mask)
            return self.head(x)

    return Model(Inner)


def _gelu(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 1.41421)) * scale


def _count(x: torch.Tensor) -> int:
    return int((x > 0).sum())


def _dropout(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5, True)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0] > 0]


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # scripting is deprecated, and in many models
    scripted_gelu = torch.jit.script(_gelu)
    scripted_count = torch.jit.script(_count)
    scripted_dropout = torch.jit.script(_dropout)
    scripted_rows = torch.jit.script(_rows)
    torch.func.jvp(torch.tanh, (torch.ones(1),), (torch.ones(1),))  # scripts its own rules the first time


@ZOO.model()
def scripted_function_in_blocks():
    class Inner(Block):
        def forward(self, x):
            return x + scripted_gelu(self.layer(self.norm(x)))

    return Stack(Inner)


@ZOO.model()
def scripted_function_in_the_model():
    class Model(Layers):
        def forward(self, x):
            h = scripted_gelu(self.b(self.a(x)), 2.0)
            return self.head(self.d(self.c(h)))

    return Model()


@ZOO.model(refused=NOT_APART + "_count returns Python values")
class ScriptedNumberOfTheBatch(Layers):
    def forward(self, x):
        return self.head(self.d(self.c(self.b(self.a(x)) * scripted_count(x))))


@ZOO.model(refused=NOT_APART + "random numbers are drawn inside _dropout")
class ScriptedDropout(Layers):
    def forward(self, x):
        return self.head(self.d(self.c(scripted_dropout(self.b(self.a(x))))))


@ZOO.model()
class ScriptedRowsOfTheBatch(Layers):
    """How many rows come out depends on the batch's numbers."""

    def forward(self, x):
        rows = scripted_rows(x)
        h = self.b(self.a(x)) + rows.sum(0) / (len(rows) + 1)
        return self.head(self.d(self.c(h)))


class Clamped(torch.autograd.Function):
    """The forward rounds, the gradient passes."""

    @staticmethod
    def forward(ctx, x, step):
        ctx.save_for_backward(x)
        return (x / step).round() * step

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 2), None


@ZOO.model()
class StraightThrough(Layers):
    def forward(self, x):
        h = Clamped.apply(self.a(x), 0.1)
        h = Clamped.apply(self.c(self.b(h)), 0.2)
        return self.head(self.d(h))


class TwoOut(torch.autograd.Function):
    """Two results, one without a gradient, and a parameter among the arguments."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        order = x.argsort(1)
        ctx.mark_non_differentiable(order)
        return x @ weight.t(), order

    @staticmethod
    def backward(ctx, gradient, _):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


@ZOO.model()
class FunctionOfAParameter(Layers):
    def forward(self, x):
        h, order = TwoOut.apply(self.a(x), self.b.weight)
        h = self.c(h).gather(1, order) + self.b.bias
        return self.head(self.d(h))


class InPlaceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@ZOO.model()
class DirtyFunction(Layers):
    def forward(self, x):
        h = self.a(x) + 0
        InPlaceFunction.apply(h)
        h = self.c(self.b(h.tanh())) + h
        return self.head(self.d(h))


@ZOO.model()
class GradientReversal(Layers):
    """Domain adversarial training: the identity with a negative gradient, which returns a view."""

    def forward(self, x):
        h = self.b(self.a(x))
        return self.head(self.c(h)) + self.d(Reversed.apply(h)).mean(1, keepdim=True)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@ZOO.model()
def func_grad_in_blocks():
    """A gradient of an energy, taken inside each block."""

    class Inner(Block):
        def forward(self, x):
            energy = torch.func.grad(lambda h: self.layer(h).square().sum())
            return x - 0.1 * energy(x)

    return Stack(Inner)


@ZOO.model()
def func_jvp_in_blocks():
    class Inner(Block):
        def forward(self, x):
            value, slope = torch.func.jvp(
                lambda h: torch.tanh(h) * h, (self.layer(x),), (torch.ones_like(x),)
            )
            return value + slope

    return Stack(Inner)


@ZOO.model()
def functional_call_in_blocks():
    class Inner(Block):
        def forward(self, x):
            scaled = {name: parameter * 0.5 for name, parameter in self.layer.named_parameters()}
            return x + torch.func.functional_call(self.layer, scaled, (self.norm(x),))

    return Stack(Inner)


@ZOO.model()
def checkpointed_blocks():
    class Model(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(x)

    return Model(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()))


@ZOO.model(
    refused=NOT_APART + "it hands a function to CheckpointFunction.apply, which use_reentrant=False would not"
)
def checkpointed_reentrant():
    class Model(Stack):
        def forward(self, x):
            x = self.blocks[0](x)
            for block in self.blocks[1:]:
                x = checkpoint(block, x, use_reentrant=True)
            return self.head(x)

    return Model(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()))


@ZOO.model()
def checkpointed_part_of_a_block():
    class Inner(Block):
        def inner(self, x, scale):
            return self.layer(self.norm(x)) * scale

        def forward(self, x):
            return x + checkpoint(self.inner, x, 0.5, use_reentrant=False)

    return Stack(Inner)


@ZOO.model()
def checkpoint_sequential_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(tanh_block() for _ in range(6)))
            self.head = nn.Linear(WIDTH, 1)

        def forward(self, x):
            return self.head(checkpoint_sequential(self.layers, 3, x, use_reentrant=False))

    return Model()


@ZOO.model()
def numpy_constants():
    class Inner(Block):
        def forward(self, x):
            import numpy as np

            table = torch.from_numpy(np.linspace(0, 1, WIDTH, dtype=np.float32))
            return self.layer(self.norm(x) + table)

    return Stack(Inner)


@ZOO.model()
def constants_of_every_kind():
    class Inner(Block):
        def forward(self, x):
            rows = torch.as_tensor([[0.1] * WIDTH])
            eye = torch.eye(WIDTH, dtype=x.dtype, device=x.device)
            return self.layer(self.norm(x) + rows) @ eye + torch.linspace(0, 1, WIDTH) + x.new_tensor(0.5)

    return Stack(Inner)


@ZOO.model()
def hooks_on_tensors():
    """A gradient clipped on its way, by a hook on a tensor."""

    class Inner(Block):
        def forward(self, x):
            h = self.layer(self.norm(x))
            if h.requires_grad:
                h.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
            return x + h

    return Stack(Inner)


@ZOO.model()
def hooks_on_modules():
    stack = Stack(tanh_block)
    for block in stack.blocks:
        block.register_forward_hook(lambda module, args, result: result * 0.5)
        block[0].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    return stack


@ZOO.model()
def hooks_that_collect_features():
    """Features for the head are caught by hooks, as feature extractors do."""

    class Model(Stack):
        def __init__(self, kind):
            super().__init__(kind)
            self.caught = []
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, result: self.caught.append(result))

        def forward(self, x):
            self.caught.clear()
            for block in self.blocks:
                x = block(x)
            found = torch.stack(self.caught).mean(0)
            self.caught.clear()
            return self.head(found)

    return Model(tanh_block)


@ZOO.model(refused=NOT_APART + "it calls requires_grad_, which does more than what it returns")
def gradient_inside_the_forward():
    """Forces: the gradient of an energy by the positions, with create_graph (molecular models)."""

    class Model(Layers):
        def forward(self, x):
            x = x.clone().requires_grad_()
            energy = self.head(self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh()).tanh())
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            return energy + force.square().sum(1, keepdim=True)

    return Model()
