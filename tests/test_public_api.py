"""What is public changes only on purpose: names, signatures and flags are those that docs/api.txt lists."""

import difflib
import importlib

import pytest

import evenflow
from public_api import LISTING, PUBLIC, listing


def test_public_names_signatures_and_flags_are_those_that_are_written_down():
    written, found = LISTING.read_text(), listing()
    difference = "\n".join(difflib.unified_diff(written.splitlines(), found.splitlines(), lineterm="", n=2))
    told = f"{difference}\nIf it is meant: python tests/public_api.py > docs/api.txt, a line in CHANGELOG.md"
    assert written == found, told


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_listed_can_be_imported(module):
    names = PUBLIC[module]
    imported = importlib.import_module(module)
    assert [name for name in names or imported.__all__ if not hasattr(imported, name)] == []


def test_every_exception_is_public():
    ours = [
        name
        for name, value in vars(evenflow.errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert set(ours) <= set(evenflow.__all__)


def test_everything_that_is_public_is_found_where_it_is_said_to_be():
    assert {name: getattr(evenflow, name).__name__ for name in evenflow.__all__} == {
        name: name for name in evenflow.__all__
    }
