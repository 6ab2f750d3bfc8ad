"""docs/training.md: what its blocks of code show, runs."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # transformers' own
def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 10
    names = {"__name__": "training"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert 0 <= names["accuracy"] <= 1
    assert float(names["averaged_loss"]) < 2
    assert (tmp_path / "tuned" / "model" / "model.safetensors").exists()
