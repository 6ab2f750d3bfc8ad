"""docs/hooks.py: links that lead out of docs/, lists that Markdown misreads, and examples of docstrings."""

import doctest
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_examples(hooks):
    found = doctest.testmod(hooks)
    assert found.attempted == 4
    assert found.failed == 0


def test_examples_of_docstrings_are_fenced(hooks):
    text = "Add.\n\nExample:\n    >>> 1 + 1\n    2\n\nMore.\n\n>>> 2\n2"
    fenced = (
        "Add.\n\nExample:\n    ```pycon\n    >>> 1 + 1\n    2\n    ```\n\nMore.\n\n```pycon\n>>> 2\n2\n```"
    )
    assert hooks.fenced(text) == fenced
