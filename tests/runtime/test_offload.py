"""What waits on the host: large memories, once each, and nothing that is there anyway."""

import gc

import pytest
import torch
from torch import nn

import evenflow
from evenflow.cost.storages import Made
from evenflow.errors import RecordError
from evenflow.pipe.building import making
from evenflow.runtime.program.offload import Away, Offload
from unsplit import assert_same_step, mean_square, pipeline_step, regression, seeded

CPU = torch.device("cpu")
SIZE = 256  # bytes of a row of 64 floats


def away(*fixed, least_bytes=SIZE):
    return Away(Offload(CPU, least_bytes=least_bytes), fixed=fixed)


def kept(waiting, act):
    with waiting.hooks(), waiting.leaving():
        return act()


def test_memory_leaves_and_comes_back_as_it_was():
    x = torch.randn(64, requires_grad=True)
    with Made(CPU) as made:
        waiting = away(x)
        result = kept(waiting, lambda: (x * 2).sigmoid().exp().sum())
        here = sum(memory.num_bytes for memory in made.alive())
        assert (waiting.num_bytes, here) == (2 * SIZE, 4)  # of sigmoid and exp; the result
        waiting.bring_back()
        assert sum(memory.num_bytes for memory in made.alive()) == 2 * SIZE + 4
        result.backward()
        del result
        gc.collect()
        assert sum(memory.num_bytes for memory in made.alive()) == SIZE  # the gradient
    y = x.detach().requires_grad_()
    (y * 2).sigmoid().exp().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_views_of_one_memory_are_one_copy():
    x = torch.randn(8, 64, requires_grad=True)
    waiting = away(x)

    def act():
        base = x.tanh()
        return (base[1:3].t() @ base[2:4]).sum() + (base[:, 1::2] * base.conj()[:, ::2]).sum()

    kept(waiting, act).backward()
    assert waiting.num_bytes == 8 * SIZE
    y = x.detach().requires_grad_()
    base = y.tanh()
    ((base[1:3].t() @ base[2:4]).sum() + (base[:, 1::2] * base.conj()[:, ::2]).sum()).backward()
    assert torch.equal(x.grad, y.grad)


def test_complex_views_keep_their_sign():
    x = torch.randn(64, dtype=torch.complex64, requires_grad=True)
    grads = []
    for waiting in (away(x), None):

        def act():
            h = x.exp()
            return (h.conj() * h.imag * h.conj().imag).abs().sum()

        result = act() if waiting is None else kept(waiting, act)
        grads.append(torch.autograd.grad(result, x)[0])
    assert torch.equal(*grads)


def test_what_is_small_or_there_anyway_stays():
    weight = torch.randn(64, 64, requires_grad=True)
    waiting = away(weight)
    kept(waiting, lambda: torch.mm(torch.ones(1, 64), weight.t()).sum())
    assert waiting.num_bytes == SIZE  # the row; not the weight, which is a view here
    small = away(least_bytes=2 * SIZE)
    kept(small, lambda: torch.ones(64, requires_grad=True).sin().sum())
    assert small.num_bytes == 0


def test_buffers_are_used_again():
    offload, x = Offload(CPU, least_bytes=SIZE), torch.randn(64, requires_grad=True)
    made = []
    own = offload.host.buffer
    offload.host.buffer = lambda size: made.append(size) or own(size)
    for _ in range(3):
        kept(Away(offload, fixed=[x]), lambda: x.sin().cos().sum()).backward()
    assert made == [SIZE]


def test_a_change_in_place_of_what_was_kept_is_an_error_still():
    x = torch.randn(64, requires_grad=True)

    def act():
        h = x * 2
        y = h.sin()
        h.add_(1)
        return y.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept(away(x), act).backward()


class Normed(nn.Module):
    """Its backward looks at a buffer that the next microbatch changes, and at activations."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 1)
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        scaled = h * self.scale
        if self.training:
            self.scale.copy_(h.detach().abs().mean(0))
        return self.last(torch.tanh(scaled))


def step(loss=mean_square, model=Normed, **options):
    built = seeded(model)()
    pipe = evenflow.pipeline(
        built, loss=loss, example=regression(), stages=2, num_microbatches=4, max_leaf_share=0.0, **options
    )
    found = pipeline_step(pipe, built, regression())
    pipe.close()
    return found


@pytest.fixture
def everything(monkeypatch):
    """Small memories leave too; what moves them, by stage."""
    made = []

    def offload(device):
        made.append(Offload(device, least_bytes=1))
        return made[-1]

    monkeypatch.setattr(making, "Offload", offload)
    return made


@pytest.mark.parametrize("recompute", [None, "full"])
def test_buffers_that_change_are_kept_beside_what_leaves(everything, recompute):
    assert_same_step(step(offload="activations", recompute=recompute), step())
    assert all(any(stage._free.values()) for stage in everything), "buffers were used"


class Walking(nn.Linear):
    def forward(self, x):
        return super().forward(torch.func.grad(lambda x: torch.sin(x).sum())(x))


@pytest.mark.usefixtures("everything")
def test_a_stage_that_allows_no_hooks_is_refused():
    with pytest.raises(RecordError, match="offload= needs them: leave offload= out"):
        step(model=lambda: nn.Sequential(nn.Linear(4, 4), Walking(4, 1)), offload="activations")
