"""docs/training.md: what its blocks of code show runs, in one process and on two."""

import os
import re
from pathlib import Path

import pytest

import evenflow

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def run_blocks(folder: Path) -> tuple[float, float]:
    """Run the page's blocks one after the other, in a folder; what two of them computed."""
    os.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 10
    names = {"__name__": "training"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names["accuracy"], float(names["averaged_loss"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # transformers' own
def test_the_blocks_run_and_find_the_same_on_two_ranks(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    monkeypatch.chdir(one)
    alone = run_blocks(one)
    assert 0 <= alone[0] <= 1
    assert evenflow.launch(run_blocks, two, nproc=2) == [alone, alone]
    for folder in (one, two):
        assert list((folder / "tuned" / "model").glob("model*.safetensors"))
        assert (folder / "tuned" / "model" / "config.json").exists()
