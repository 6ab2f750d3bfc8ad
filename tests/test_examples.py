"""The examples run as their first lines say, in one process and under torchrun, and stay short.

The larger ones are run in this process, which has imported torch and transformers already, for fewer steps.
"""

import base64
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import notebook
from pages import blocks_of
from preloaded import python

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WAYS = pytest.mark.parametrize("way", [[], TORCHRUN], ids=["one-process", "torchrun"])


def run(way, name, folder=EXAMPLES):
    done = subprocess.run(
        [*python(), *way, EXAMPLES / name],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
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


def test_the_script_of_the_tour_gives_two_processes_the_losses_of_one(tmp_path):
    script = next(
        each.text for each in blocks_of(EXAMPLES.parent / "docs" / "tour.md") if each.language == "python"
    )
    # Each process into a file of its own: what two of them print may come mixed.
    lines = ["import os", "open(f'{os.getpid()}.txt', 'w').write(repr([loss.hex() for loss in losses]))"]
    (tmp_path / "train.py").write_text("\n".join([script, *lines]))
    one, two = tmp_path / "one", tmp_path / "two"
    for way, folder in (([], one), (TORCHRUN, two)):
        folder.mkdir()
        run(way, tmp_path / "train.py", folder)
    (losses,) = [path.read_text() for path in one.iterdir()]
    assert [path.read_text() for path in two.iterdir()] == [losses, losses]


@pytest.fixture
def example(capsys, monkeypatch):
    """Runs an example's main() here, with other sizes and arguments; what it prints."""

    def call(name, *arguments, **sizes):
        spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for size, value in sizes.items():
            assert hasattr(module, size)
            monkeypatch.setattr(module, size, value)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


def test_a_u_net_finds_discs(example):
    output = example("unet.py", NUM_STEPS=20)
    assert "stage 0: down1.0 ... max_pool2d, sends 3 tensors" in output
    assert "stage 2: widen1 ... " in output
    first, *_, last = map(float, re.findall(r"loss ([\d.]+)", output))
    assert last < first / 3


def test_experts_learn_to_sort_and_are_kept_in_balance(example):
    output = example("mixture_of_experts.py", NUM_STEPS=20)
    (whole,), (parts,) = (
        map(float, re.findall(pattern, output))
        for pattern in (r"whole batch ([\d.]+)", r"8 microbatches' +([\d.]+)")
    )
    assert 1 <= whole < parts < 1.1
    first, last = map(float, re.findall(r"cross entropy ([\d.]+)", output))
    assert last < 0.75 * first


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_an_adapter_is_trained_exported_and_loaded_by_peft(example, tmp_path):
    pytest.importorskip("peft")
    output = example("finetune_lora.py", "--out", tmp_path / "adapter", NUM_STEPS=6)
    first, *_, last = map(float, re.findall(r"step .* loss ([\d.]+)", output))
    assert last < first - 0.2
    assert "exported ['adapter_config.json', 'adapter_model.safetensors']" in output
    trained, loaded = re.search(r"pipeline ([\d.]+), of peft's .* adapter ([\d.]+)", output).groups()
    assert trained == loaded
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_tour_shows_what_it_says():
    """The text that stands in the notebook is what its cells show, but for the numbers; so is the picture."""
    path = EXAMPLES / "tour.ipynb"
    written = notebook.read(path)
    assert path.stat().st_size < 100_000
    num_threads = torch.get_num_threads()
    try:
        found = notebook.run(written)
    finally:
        torch.set_num_threads(num_threads)
    cells = [cell for cell in written["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [shape(cell["outputs"]) for cell in cells] == [shape(outputs) for outputs in found]
    pictures = [png for png in map(picture, found) if png is not None]
    assert [png[:4] for png in pictures] == [b"\x89PNG"]
    text = "".join(line for outputs in found for each in outputs for line in each.get("text", ()))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert losses[-1] < 0.1 < losses[0]
    assert text.endswith("equal: everything, bit for bit\n")


def shape(outputs):
    """What a cell shows, with # for each number, whatever its size and the room it takes."""
    lines = [line for each in outputs for line in each.get("text", ()) or each["data"]["text/plain"]]
    return [re.sub(r" +", " ", re.sub(r"\d[\d.,:]*( [KMG]iB)?", "#", line)) for line in lines]


def picture(outputs):
    found = [each["data"]["image/png"] for each in outputs if "image/png" in each.get("data", ())]
    return base64.b64decode(found[0]) if found else None


@pytest.mark.parametrize("name", ["two_stage_linear.py", "two_stage_transformer.py"])
def test_an_example_fits_on_a_page(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 80
