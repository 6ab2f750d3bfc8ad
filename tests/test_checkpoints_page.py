"""docs/checkpoints.md: what its blocks of code show runs, and goes on."""

import re
import tomllib
from pathlib import Path

from evenflow.checkpoint.manifest import checkpoints_in
from evenflow.cli.config import Saving

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()


def run(names):
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "checkpoints.md", "exec"), names)
    return names


def test_the_blocks_run_and_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run({"__name__": "page"})
    assert (first["pipe"].num_updates, first["pipe"].epoch) == (8, 2)
    assert [each.name for each in checkpoints_in(tmp_path / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]
    second = run({"__name__": "page"})
    assert (second["pipe"].num_updates, second["pipe"].epoch) == (8, 2), "it went on behind six updates"


def test_the_configuration():
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    Saving(**tomllib.loads(block)["checkpoints"])
