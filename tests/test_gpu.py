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


def losses(num_stages, schedule="1f1b", **options):
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
        **options,
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


# -- meshes, types and memory


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "clip_norm": 0.5},
        {"precision": "fp16", "clip_norm": 0.5},
        {"recompute": "full"},
        {"offload": "activations"},
        {"recompute": "selective", "offload": "activations", "clip_norm": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_levers_on_a_gpu_give_the_losses_of_one_stage(options, schedule):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        types = {key: value for key, value in options.items() if key in ("precision", "clip_norm")}
        assert losses(4, schedule, **options) == losses(1, **types)
    finally:
        torch.use_deterministic_algorithms(False)


class Wide(nn.Module):
    """Layers whose activations are far more than their parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8))
        self.head = nn.Linear(64, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def peak_bytes(**options):
    torch.manual_seed(0)
    batch = {"x": torch.randn(2**17, 64), "y": torch.randn(2**17, 1)}
    pipe = evenflow.pipeline(
        Wide(),
        loss=loss,
        example=batch,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
        stages=2,
        schedule="gpipe",
        num_microbatches=4,
        device="cuda",
        **options,
    )
    pipe.step(batch)
    return pipe.meter.peak_bytes(lambda: pipe.step(batch))[1]


@pytest.mark.parametrize("options", [{"recompute": "full"}, {"offload": "activations"}], ids=str)
def test_less_is_held_on_a_gpu(options):
    assert peak_bytes(**options) < 0.7 * peak_bytes()


def losses_on_a_mesh(mesh, options):
    return losses(mesh.get("pp", 1), mesh=mesh, **options)


@pytest.mark.parametrize("options", [{}, {"shard": "zero1", "clip_norm": 0.5}], ids=str)
def test_data_ranks_on_gpus(options):
    clip = {key: value for key, value in options.items() if key == "clip_norm"}
    expected = losses(1, **clip)
    for found in launch(losses_on_a_mesh, {"dp": 2}, options, nproc=2):
        assert found == pytest.approx(expected, rel=1e-4)


def test_sharding_needs_a_gpu_for_each_process():
    if torch.cuda.device_count() > 1:
        found = launch(losses_on_a_mesh, {"dp": 2}, {"shard": "fsdp"}, nproc=2)
        assert found[0] == pytest.approx(losses(1), rel=1e-4)
        return
    with pytest.raises(evenflow.errors.ConfigError, match='shard="fsdp" needs a GPU for each process'):
        launch(losses_on_a_mesh, {"dp": 2}, {"shard": "fsdp"}, nproc=2)
