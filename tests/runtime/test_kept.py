"""Buffers that a forward changes: the backward and later readers find them as that microbatch left them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import evenflow
from evenflow.graph.leaves.snapshots import copy_of
from evenflow.runtime.program.kept import kept_as_left
from unsplit import assert_splits, mean_square, mlp, regression, seeded

WIDTH = 4


class Norm(nn.Module):
    """Divides by a running mean, which it changes before the division, after it, or unseen after it."""

    def __init__(self, changed):
        super().__init__()
        self.layer, self.changed = nn.Linear(WIDTH, WIDTH), changed
        self.register_buffer("spread", torch.ones(WIDTH))

    def forward(self, x):
        h = self.layer(x)
        if self.changed == "before":
            self.spread.lerp_(h.detach().std(0), 0.1)
        out = h / self.spread
        if self.changed == "through data":
            self.spread.data.lerp_(h.detach().std(0), 0.1)
        if self.changed == "view through data":
            self.spread[:2].data.mul_(1.1)
        return out


def norms(changed):
    return seeded(lambda: nn.Sequential(*(Norm(changed) for _ in range(4)), nn.Linear(WIDTH, 1)))


@pytest.mark.parametrize("atomic", [(), (Norm,)])
@pytest.mark.parametrize("changed", ["before", "through data", "view through data"])
@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])  # a whole backward, and one in two parts
def test_the_backward_finds_buffers_as_its_own_forward_left_them(changed, schedule, atomic):
    assert_splits(
        norms(changed),
        regression(),
        loss=mean_square,
        num_microbatches=4,
        schedule=schedule,
        atomic=atomic,
    )


def test_a_buffer_read_after_its_last_change_may_be_on_another_stage():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.head = nn.Linear(WIDTH, 1)
            self.register_buffer("scale", torch.ones(2, 2))

        def forward(self, x):
            self.scale *= 1.1
            half = self.scale[:, 0]
            for layer in self.layers:
                x = layer(x) * self.scale.mean()
            return self.head(x) * half.sum()

    def loss(model, batch):
        return functional.mse_loss(model(batch["x"]) / model.scale[1, 1], batch["y"])

    assert_splits(seeded(Counting), regression(), loss=loss, num_microbatches=4, stages=(2, 4, 6))


def test_buffers_that_only_count_are_not_kept():
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(2)),
        nn.Linear(WIDTH, 1),
    )
    with pytest.warns(UserWarning, match="BatchNorm"):
        pipe = evenflow.pipeline(model, loss=mean_square, example=regression(), stages=2, num_microbatches=2)
    sections = pipe._parts.recordings.entries[0].cut.sections
    assert not any(section.kept_buffers for section in sections)
    pipe.close()


def test_all_that_is_kept_of_one_memory_is_copied_once():
    buffer, x = torch.ones(4, 2), torch.ones(4, 2, requires_grad=True)
    with kept_as_left([buffer]):
        whole, part = x * buffer, x[:, 0] * buffer[:, 1]
        buffer.data.mul_(2)  # as in a plain loop, the backward finds what the forward left
    buffer.data.zero_()
    (whole.sum() + part.sum()).backward()
    assert x.grad.tolist() == [[4.0, 2.0]] * 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 4)[:, 1:3],
        torch.randn(3).expand(2, 3),
        torch.randn(2, 3).t(),
        torch.ones(()),
        torch.ones(0),
    ],
)
def test_a_copy_lies_in_memory_as_what_it_is_of(tensor):
    copied = copy_of(tensor)
    assert torch.equal(copied, tensor)
    assert copied.stride() == tensor.stride()
    assert copied.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()


class Output:
    def __init__(self, logits, mean):
        self.logits, self.mean = logits, mean


@pytest.mark.parametrize("factor", [1.1, None])
def test_a_buffer_may_come_back_in_an_object(factor):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(WIDTH, WIDTH, WIDTH, 1)
            self.register_buffer("mean", torch.ones(WIDTH))

        def forward(self, x):
            if factor is not None:
                self.mean.mul_(factor)
            return Output(self.layers(x), self.mean)

    def loss(model, batch):
        output = model(batch["x"])
        return functional.mse_loss(output.logits, batch["y"]), output

    model = seeded(Returning)()
    pipe = evenflow.pipeline(
        model, loss=loss, example=regression(), stages=2, num_microbatches=2, max_leaf_share=0.0
    )
    first, second = pipe.step(regression()).metrics
    pipe.close()
    expected = torch.ones(WIDTH)
    for found in (first, second):
        expected = expected if factor is None else expected * factor
        assert torch.equal(found.mean, expected)
    assert torch.equal(model.mean, expected)


def test_gradients_of_functions_beside_buffers_that_are_kept_are_refused():
    class Both(Norm):
        def forward(self, x):
            self.spread.mul_(1.1)
            inner = torch.func.grad(lambda z: (z * self.spread).sum())
            return self.layer(x) / self.spread + inner(x.detach())

    model = nn.Sequential(Both("before"), nn.Linear(WIDTH, 1))
    pipe = evenflow.pipeline(
        model, loss=mean_square, example=regression(), stages=2, num_microbatches=2, atomic=[Both]
    )
    with pytest.raises(evenflow.RecordError, match=r"calls torch\.func\.grad .* clone\(\) of the buffer"):
        pipe.step(regression())
    pipe.close()
