"""What needs a CUDA device: stages on it in one process, equal to one stage there."""

import pytest
import torch
from torch import nn

import evenflow

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    """Layers with dropout, a skip connection and a buffer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(32, 1)
        self.register_buffer("scale", torch.full((32,), 0.5))

    def forward(self, x):
        h = x
        for layer in self.layers:
            h = h + self.dropout(torch.tanh(layer(h))) * self.scale
        return self.head(h + x)


def loss(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def losses(num_stages, schedule="1f1b"):
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 32), "y": torch.randn(16, 1)}
    pipe = evenflow.pipeline(
        Net(),
        loss=loss,
        example=batch,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        stages=num_stages,
        schedule=schedule,
        num_microbatches=4,
        device="cuda",
    )
    found = [pipe.step(batch).loss for _ in range(3)]
    assert all(parameter.is_cuda for _, parameter in pipe.named_parameters())
    assert all(one.is_cuda for one in found)
    return [float(one) for one in found]


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_on_a_gpu_give_the_losses_of_one_stage(num_stages, schedule):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert losses(num_stages, schedule) == losses(1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_users_cuda_generator_is_left_alone():
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    losses(2)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_allocator_tells_a_steps_peak_of_memory():
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 32), "y": torch.randn(16, 1)}
    pipe = evenflow.pipeline(
        Net(),
        loss=loss,
        example=batch,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        stages=2,
        num_microbatches=4,
        device="cuda",
    )
    pipe.step(batch)
    result, peak = pipe.meter.peak_bytes(lambda: pipe.step(batch))
    held = sum(4 * parameter.numel() for _, parameter in pipe.named_parameters())
    assert 4 * held < peak <= torch.cuda.max_memory_allocated()  # with gradients and two states
    assert result.loss.is_cuda
