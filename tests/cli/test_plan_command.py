"""`evenflow plan`: from a configuration and a few words about a machine to a plan on paper."""

from pathlib import Path

import pytest
import torch

from evenflow.cli.job import Flags, make_job
from evenflow.cli.main import main
from evenflow.cli.training import prepare_here
from evenflow.cost.cache import device_name
from evenflow.errors import ConfigError
from evenflow.plan.plan_file import read_plan_file

CONFIG = Path(__file__).parents[2] / "examples" / "train_gpt.toml"


def planned(capsys, *arguments, source=CONFIG):
    """(exit code, output, errors) of the command."""
    with pytest.raises(SystemExit) as exited:
        main(["plan", str(source), *map(str, arguments)])
    written = capsys.readouterr()
    return exited.value.code, written.out, written.err


def test_a_plan_is_shown_and_written(capsys, tmp_path):
    out = tmp_path / "plan.toml"
    code, shown, _ = planned(capsys, "--cluster", "2x RTX 4090", "--rows", 64, "-o", out)
    assert code == 0
    assert "a step expected" in shown
    assert "runners-up" in shown
    found = read_plan_file(out)
    assert found.degrees.num_devices in (1, 2)
    assert found.microbatch_size * found.num_microbatches * found.degrees.data == 64
    assert found.prediction.bound_seconds <= found.prediction.step_seconds
    again, _, errors = planned(capsys, "--cluster", "2x RTX 4090", "-o", out)
    assert again == 2
    assert "it exists; name another file, or remove it first" in errors


SMALL = """
[model]
function = "{gpt}"
arguments = {{ num_layers = 2, width = 32, length = 32 }}
[data]
batch_size = 2
length = 32
"""


def test_without_a_cluster_this_machine_is_measured(capsys, tmp_path):
    config, out = tmp_path / "small.toml", tmp_path / "plan.toml"
    config.write_text(SMALL.format(gpt=f"{CONFIG.parent / 'gpt.py'}:build"), encoding="utf-8")
    code, shown, errors = planned(capsys, "-o", out, source=config)
    assert code == 0, errors
    found = read_plan_file(out)
    assert found.degrees.num_devices == found.degrees.pipeline == 2
    assert found.ranks[0].device == device_name(torch.device("cpu"))
    assert found.prediction.update_seconds > 0
    assert "s a step expected" in shown
    job = make_job(Flags(source=str(config), plan=out, device="cpu", out=tmp_path / "run"))
    prepare_here(job)[0].close()


@pytest.mark.parametrize("flag", [("--rows", 64), ("--target", "megatron")])
def test_what_is_not_measured_needs_a_cluster(capsys, flag):
    code, _, errors = planned(capsys, *flag)
    assert code == 2
    assert f"{flag[0]} plans for a machine that is not measured" in errors


def test_a_plan_can_be_trained(capsys, tmp_path):
    out = tmp_path / "plan.toml"
    code, _, _ = planned(capsys, "--cluster", "2x CPU core", "--pipeline-only", "-o", out)
    found = read_plan_file(out)
    assert code == 0
    assert found.degrees.num_devices == found.degrees.pipeline == 2
    job = make_job(Flags(source=str(CONFIG), plan=out, device="cpu", out=tmp_path / "run"))
    pipe, _ = prepare_here(job)
    firsts = [stage.first.partition("#")[0] for stage in found.stages]  # the plan tells namesakes apart
    assert [cut.first for cut in pipe.cut] == firsts
    assert job.schedule == found.schedule
    pipe.close()
    with pytest.raises(ConfigError, match="--schedule and --plan are both given"):
        make_job(Flags(source=str(CONFIG), plan=out, schedule="gpipe"))


def test_too_little_memory_is_told_in_numbers_and_what_would_fit(capsys):
    code, _, errors = planned(capsys, "--cluster", "2x CPU core", "--memory", "0.5178GiB", "--pipeline-only")
    assert code == 2
    assert "no plan fits into memory; the nearest: 2 pipeline ranks" in errors
    assert "and has 18.2 MiB: parameters" in errors
    assert "- 1 more CPU core, 3 devices in all: 3 pipeline ranks" in errors


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--cluster", "2xRTX 4091", "did you mean"),
        ("--cluster", "no_such.toml", "no_such.toml"),
        ("--memory", "24", "is no size"),
    ],
)
def test_a_wrong_machine_is_refused(capsys, flag, value, message):
    code, _, errors = planned(capsys, flag, value)
    assert code == 2
    assert message in errors.replace("\n", " ")


MODEL = '''
import torch
from torch import nn


class Layers(nn.Module):
    def __init__(self, width, number):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(number))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def make(width=8, number=4, rows=8):
    return Layers(width, number), lambda model, x: model(x).square().mean(), torch.ones(rows, width)


def untouchable():
    """More parameters than any machine has memory for, and no forward: it must not come to that."""
    model = Layers(2**16, 64)
    model.forward = None
    return model, lambda model, x: model(x).mean(), torch.ones(1, 2**16)
'''


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "layers_to_plan.py"
    path.write_text(MODEL, encoding="utf-8")
    return path


def test_what_can_never_fit_is_refused_before_it_is_recorded(capsys, model_file):
    code, _, errors = planned(capsys, "--cluster", "8xH100", source=f"{model_file}:untouchable")
    assert code == 2
    assert "each held once, need 5,120.1 GiB, and all devices together have 629.2 GiB" in errors
    assert "LoRA of rank 16 on all linear layers, 134,217,728 elements" in errors


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("torchtitan", '[["tok_embeddings", "layers.0"'),
        ("megatron", '--pipeline-model-parallel-layout "Et'),
        ("deepspeed", '"train_batch_size": 8'),
    ],
)
def test_a_plan_for_another_system_comes_with_its_settings(capsys, target, expected):
    flags = ("--cluster", "2x CPU core", "--pipeline-only", "--target", target)
    code, shown, _ = planned(capsys, *flags)
    assert code == 0
    assert f"for {target}:" in shown
    assert expected in shown


def test_the_size_of_a_microbatch_may_be_any_that_divides_the_rows(capsys, tmp_path, model_file):
    config = tmp_path / "run.toml"
    text = '[model]\nfunction = "layers_to_plan.py:make"\narguments = {rows = 12}\n'
    text += "[pipeline]\nmicrobatch_size = "
    for size, expected in ((6, "2 microbatches of 6"), (5, "microbatches of 5 rows, from the 12 rows")):
        config.write_text(f"{text}{size}\n", encoding="utf-8")
        _, shown, errors = planned(capsys, "--cluster", "1x CPU core", source=config)
        assert expected in (shown or errors)
