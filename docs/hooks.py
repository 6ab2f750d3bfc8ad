"""What the site needs beyond MkDocs: pages link to files of the repository, and docstrings have examples.

On GitHub `../examples/gpt.py` leads to that file. In the site there is nothing above the pages, so each file
outside of docs/ that a page links to becomes a page too, a notebook with what its cells show, and the link is
bent to it.
"""

import json
import logging
import posixpath
import re
from pathlib import Path

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks")  # warnings end a strict build
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".toml": "toml"}
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages of the menu that stand beside docs/
_ITEM = re.compile(r"(?P<indent> *)(?:[-*+]|\d+\.) ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand beside docs/, and each file outside of it that a page links to."""
    root = Path(config.docs_dir).parent
    for beside in OUTSIDE:
        files.append(File.generated(config, beside, content=(root / beside).read_text()))
    for page in list(files.documentation_pages()):
        for match in _LINK.finditer(page.content_string):
            path = in_repository(page.src_uri, match["path"])
            place = in_site(path)
            if not path.startswith("docs/") and (root / path).is_file() and place not in files.src_uris:
                content = _shown(root / path, path)
                made = File.generated(config, place, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_others: object) -> str:
    """Bend links that lead out of docs/ to the pages that stand for those files."""
    own = page.file.src_uri
    for line in misread_lists(markdown):
        _LOG.warning(
            "%s: a list needs an empty line before, and four spaces inside of another: %s", own, line
        )

    def bent(match: re.Match[str]) -> str:
        place = in_site(in_repository(own, match["path"]))
        return posixpath.relpath(place, posixpath.dirname(own)) if place in files.src_uris else match["path"]

    return _LINK.sub(bent, markdown)


def misread_lists(markdown: str) -> list[str]:
    r"""Lines that GitHub takes for items of a list, and Markdown here for something else.

    >>> misread_lists("1. One:\n   - a\n\nText:\n- b\n\n```\n- c\n- d\n```\n")
    ['   - a', '- b']
    """
    found, before, fenced = [], "", False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (item := _ITEM.match(line)):
            deep = len(item["indent"]) in {1, 2, 3}
            in_text = not item["indent"] and before and not before[0].isspace() and not _ITEM.match(before)
            if deep or in_text:
                found.append(line)
        before = line
    return found


def in_repository(page: str, link: str) -> str:
    """Where a page's link leads, from the repository's root.

    >>> in_repository("api/index.md", "../../examples/gpt.py"), in_repository("CHANGELOG.md", "docs/own.md")
    ('examples/gpt.py', 'docs/own.md')
    """
    folder = "" if page in OUTSIDE else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link))


def in_site(path: str) -> str:
    """The page, or the file, of the site that stands for a file of the repository.

    >>> in_site("docs/own.md"), in_site("docs/timeline.png"), in_site("examples/gpt.py"), in_site("README.md")
    ('own.md', 'timeline.png', 'examples/gpt.py.md', 'index.md')
    """
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    return path if path.endswith(".md") else f"{path}.md"


def _shown(file: Path, path: str) -> str:
    """A file of the repository as a page."""
    if file.suffix == ".md":
        return file.read_text()
    if file.suffix == ".ipynb":
        return notebook(file.read_text())
    return f"# {path}\n\n{_block(file.read_text(), _LANGUAGES.get(file.suffix, ''))}"


def _block(text: str, language: str) -> str:
    fence = "`" * 4
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def notebook(text: str) -> str:
    r"""A notebook as a page: what is written, the code, and what its cells show.

    >>> print(
    ...     notebook(
    ...         '{"cells": [{"cell_type": "markdown", "source": ["# Two"]}, {"cell_type": "code",'
    ...         '"source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}]}]}'
    ...     )
    ... )
    # Two
    <BLANKLINE>
    ````python
    1 + 1
    ````
    <BLANKLINE>
    ````text
    2
    ````
    <BLANKLINE>
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(f"{source}\n")
            continue
        parts.append(_block(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![What the cell shows](data:image/png;base64,{data['image/png'].strip()})\n")
            else:
                parts.append(_block("".join(output.get("text") or data["text/plain"]), "text"))
    return "\n".join(parts)


class Doctests(Extension):
    """Examples of docstrings as blocks of code: Markdown takes `>>>` for quotations."""

    def on_object(self, *, obj: Object, **_others: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Put fences around each example and its output, which end with an empty line."""
    lines, inside = [], ""
    for line in [*text.splitlines(), ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith(">>>") and not inside:
            inside = f"{indent}```"
            lines.append(f"{inside}pycon")
        if not line.strip() and inside:
            lines.append(inside)
            inside = ""
        lines.append(line)
    return "\n".join(lines[:-1])
