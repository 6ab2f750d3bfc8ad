"""What needs a CUDA device: stages on it in one process and in two, equal to one stage there."""

import json

import pytest
import torch
from torch import distributed, nn
from torch.profiler import ProfilerActivity, profile

import evenflow
from evenflow.launcher import launch
from evenflow.runtime.links.copies import Copied, Copies

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


@pytest.mark.parametrize("schedule", ["sequential", "gpipe", "1f1b", "zb-h1"])
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


# -- tensors between devices


def test_a_link_copies_between_devices_and_keeps_how_tensors_lie():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    base = torch.arange(60.0).view(3, 4, 5)
    tensors = (base, base.permute(2, 0, 1), base[:, ::2], base[:1, :1].expand(3, 4, 5), base[0, 0, 0])
    there, back = Copies(), Copies()
    for tensor in tensors:
        sent = there.begin(tensor, gpu)
        assert isinstance(sent, Copied)
        on_gpu = sent.taken()
        returned = back.begin(on_gpu * 2, cpu).taken()
        assert on_gpu.stride() == tensor.stride()
        assert torch.equal(on_gpu.cpu(), tensor)
        assert torch.equal(returned, tensor * 2)
        assert there.begin(on_gpu, gpu) is on_gpu


def test_copies_overlap_with_what_the_device_computes(tmp_path):
    x, matrix = torch.randn(2**26, device="cuda"), torch.randn(4096, 4096, device="cuda")
    copies, cpu = Copies(), torch.device("cpu")
    for _ in range(2):  # kernels are loaded and memory is pinned in the first
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            sent = copies.begin(x, cpu)
            for _ in range(20):
                matrix @ matrix
            found = sent.taken()
            torch.cuda.synchronize()
    assert torch.equal(found, x.cpu())
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {
        kind: [(e["ts"], e["ts"] + e["dur"], e["args"]["stream"]) for e in events if e.get("cat") == kind]
        for kind in ("gpu_memcpy", "kernel")
    }
    copied = max(spans["gpu_memcpy"], key=lambda span: span[1] - span[0])
    beside = [min(copied[1], k[1]) - max(copied[0], k[0]) for k in spans["kernel"] if k[2] != copied[2]]
    assert sum(each for each in beside if each > 0) > 0.5 * (copied[1] - copied[0])


def losses_of_a_rank():
    found = losses(2)
    assert distributed.get_backend() == "gloo"
    return found


def test_two_processes_share_a_gpu_over_gloo():
    if torch.cuda.device_count() > 1:
        pytest.skip("there is a GPU for each process")
    assert launch(losses_of_a_rank, nproc=2) == [losses(1)] * 2
