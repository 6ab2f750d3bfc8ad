"""The examples run as their first lines say, in one process and under torchrun, and stay short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WAYS = pytest.mark.parametrize("way", [[], TORCHRUN], ids=["one-process", "torchrun"])


def run(way, name):
    done = subprocess.run(
        [sys.executable, *way, EXAMPLES / name], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@WAYS
def test_two_linear_layers(way):
    output = run(way, "two_stage_linear.py")
    num_processes = 2 if way else 1
    assert output.count("cut by hand, after the ReLU:") == num_processes
    assert output.count("cut automatically:") == num_processes
    # Each process compares the weights of its own stages, once for each way to cut.
    assert output.count("same weights as the whole model: True") == 2 * num_processes
    assert "same weights as the whole model: False" not in output
    assert output.count("output (32, 1024)") == 2
    for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)", output):
        assert float(last) < float(first)


@WAYS
def test_two_halves_of_a_transformer(way):
    output = run(way, "two_stage_transformer.py")
    assert re.search(r"stage 1: layers\.2.* \.\.\. cross_entropy", output)
    shares = [int(share) for share in re.findall(r"(\d+)% right", output)]
    assert len(shares) == 4
    assert shares[0] < 30
    assert shares[-1] > 90


@pytest.mark.parametrize("name", ["two_stage_linear.py", "two_stage_transformer.py"])
def test_an_example_fits_on_a_page(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 80
