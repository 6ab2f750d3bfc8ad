"""README.md, CONTRIBUTING.md and every page under docs/: what can be typed there does what the page says.

The blocks of a page that are marked `python` or `sh` run as they stand, in order: in a process of their own,
the blocks of Python with one set of names, those of the shell by `bash -e`, in an empty folder with a copy of
`examples/`. Nothing is shortened or replaced: where a page shows a run of minutes, that block carries
`<!-- not run: REASON -->` in front, and only its syntax is checked: by Python's compiler, or by `bash -n` and
Evenflow's own parser of arguments.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import evenflow
import pages
import preloaded

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(page, folder, *expressions):
    """Run the page in a process of its own; what the expressions are when it has ended."""
    there = {**os.environ, "PATH": f"{preloaded.folder_of_commands()}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*preloaded.python(), pages.__file__, page, *expressions],
        cwd=folder, env=there, text=True, capture_output=True, check=False, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def in_folder(page, folder):
    """What two blocks of docs/training.md computed: one rank of two."""
    os.chdir(folder)
    names = pages.run_blocks(page)
    return [names["accuracy"], float(names["averaged_loss"])]


def after_training(page, folder, alone):
    two = folder / "two"
    two.mkdir()
    assert evenflow.launch(in_folder, page, two, nproc=2) == [alone, alone], "two ranks find the same"
    for each in (folder, two):
        assert list((each / "tuned" / "model").glob("model*.safetensors"))
        assert (each / "tuned" / "model" / "config.json").exists()


def after_checkpoints(page, folder, first):
    saved = sorted((folder / "checkpoints").glob("*/manifest.json"))
    assert (first, [each.parent.name for each in saved]) == ([8, 2], ["step-00000003", "step-00000006"])
    written_at = [each.stat().st_mtime_ns for each in saved]
    assert run(page, folder, *AFTER[page.name][0]) == first
    assert [each.stat().st_mtime_ns for each in saved] == written_at, "it went on behind six updates"


# What is asked of a page beyond that it runs: expressions, and what is done with them.
AFTER = {
    "training.md": (("accuracy", "float(averaged_loss)"), after_training),
    "checkpoints.md": (("pipe.num_updates", "pipe.epoch"), after_checkpoints),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(page, tmp_path):
    assert not pages.faults(page)
    if not any(block.runs for block in pages.blocks_of(page)):
        return
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    expressions, check = AFTER.get(page.name, ((), None))
    found = run(page, tmp_path, *expressions)
    if check is not None:
        check(page, tmp_path, found)


def written(folder, text):
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_blocks_run_in_order_with_one_set_of_names(tmp_path):
    page = written(
        tmp_path,
        "```python\nx = 1\n```\n- a list\n\n  ```sh\n  echo 2 > file\n  ```\n\n"
        "<!-- not run: no such thing -->\n```python\nx = nothing\n```\n\n"
        "```text\nnothing\n```\n\n```python\nx += int(open('file').read())\n```\n",
    )
    assert not pages.faults(page)
    assert run(page, tmp_path, "x") == [3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n```python\nx = 1\n\nx.missing\n```\n", 'page.md", line 5'),
        ("```sh\ntrue\nfalse\ntrue\n```\n", "page.md, line 2: bash -e ended with 1"),
        ("```sh\nevenflow schedule gpipe --rank 2\n```\n", "No such option"),
    ],
)
def test_a_block_that_fails_is_named(text, said, tmp_path):
    page = written(tmp_path, text)
    assert not pages.faults(page)
    with pytest.raises(AssertionError, match=said):
        run(page, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- not run: minutes -->\n```python\nx = = 1\n```\n", "line 3: invalid syntax"),
        ("<!-- not run: minutes -->\n```sh\nfor x in\n```\n", "syntax error"),
        ("<!-- not run: minutes -->\n```sh\nevenflow train a.toml --stage 2\n```\n", "No such option"),
        ("<!-- not run: minutes -->\n```sh\nevenflow trian a.toml\n```\n", "KeyError: 'trian'"),
        ("<!-- not run: minutes -->\n\nText.\n\n```python\nx = 1\n```\n", "not followed by its block"),
        ("<!-- not run -->\n```python\nx = 1\n```\n", "gives no reason"),
        ("<!-- not run: tests/test_none.py does -->\n```sh\ntrue\n```\n", "there is no tests/test_none.py"),
        ("```python\nx = 1\n", "not closed"),
        ("```sh\npip install evenflow\n```\n", "line 2: pip does not run in a test"),
        ("```shell\ntrue\n```\n", "a block of 'shell'"),
        ("```toml\na = [1\n```\n", "line 2: Unclosed array"),
        ("```\nevenflow show runs/gpt\n```\n", "call its block sh"),
    ],
)
def test_a_block_that_is_not_run_is_read(text, said, tmp_path):
    (fault,) = pages.faults(written(tmp_path, text))
    assert said in fault
