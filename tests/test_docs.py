"""The documentation: every file that a page links to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in LINK.findall(prose) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_map_of_the_design_names_every_file():
    page = (ROOT / "docs" / "design.md").read_text()
    (drawn,) = re.findall(r"```\nsrc/evenflow/\n(.*?)```", page, re.DOTALL)
    source = ROOT / "src" / "evenflow"
    place, named = "", dict[str, set[str]]()
    for line in drawn.splitlines():
        folder = re.match(r"  (?:   +)?(\w+)/ ", line)
        place = folder[1] if folder else place if line.startswith("    ") else ""
        names = re.split(r" {3,}", line[folder.end() :].strip() if folder else line.strip())[0]
        named.setdefault(place, set()).update(names.split())
    missing = [
        str(path.relative_to(source))
        for path in sorted(source.rglob("*.py"))
        # Each method of the catalog has a file of its own: the map says so, and names none.
        if not path.stem.startswith("__") and path.parent.name != "schedules"
        if path.stem not in named.get("" if path.parent == source else path.parent.name, set())
    ]
    assert not missing
