"""What the site needs beyond MkDocs: pages link to files of the repository, and docstrings have examples.

On GitHub `../examples/gpt.py` leads to that file. In the site there is nothing above the pages, so each file
outside of docs/ that a page links to becomes a page too, and the link is bent to it.
"""

import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks")  # warnings end a strict build
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".toml": "toml"}
_CHANGELOG = "CHANGELOG.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, and each file outside of docs/ that a page links to."""
    root = Path(config.docs_dir).parent
    files.append(File.generated(config, _CHANGELOG, content=(root / _CHANGELOG).read_text()))
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:
        for match in _LINK.finditer(page.content_string):
            if (outside := _outside(page.src_uri, match["path"])) and not files.get_file_from_path(
                _page_of(outside)
            ):
                files.append(File.generated(config, _page_of(outside), content=_shown(root / outside, outside)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Bend links that lead out of docs/ to the pages that stand for those files."""

    def bent(match: re.Match[str]) -> str:
        outside = _outside(page.file.src_uri, match["path"])
        if outside is None:
            return match["path"]
        depth = len(PurePosixPath(page.file.src_uri).parts) - 1
        return "../" * depth + _page_of(outside)

    return _LINK.sub(bent, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn of a list that Markdown here, unlike GitHub's, takes for the rest of a paragraph."""
    for found in re.finditer(r"<(?:p|li)>[^<]*(?:<(?!/?(?:p|li|ul|ol)\b)[^<]*)*?\n *(?:[-*]|\d+\.) [^\n]*", html):
        _LOG.warning("%s: a list needs an empty line before it, and four spaces inside of another: %s",
                     page.file.src_uri, found[0][-80:])  # fmt: skip
    return html


def _outside(page: str, link: str) -> str | None:
    """The path from the repository's root where a page's link leads out of docs/; else None."""
    base = PurePosixPath(".") if page == _CHANGELOG else PurePosixPath("docs", page).parent
    parts: list[str] = []
    for part in (base / link).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    path = "/".join(parts)
    return path.removeprefix("docs/") if page == _CHANGELOG else None if parts[0] == "docs" else path


def _page_of(path: str) -> str:
    """The page of the site that stands for a file of the repository."""
    return path if path.endswith(".md") else f"{path}.md"


def _shown(file: Path, path: str) -> str:
    """A file of the repository as a page."""
    if file.suffix == ".md":
        return file.read_text()
    fence = "`" * 4
    return f"# {path}\n\n{fence}{_LANGUAGES.get(file.suffix, '')}\n{file.read_text()}{fence}\n"


class Doctests(Extension):
    """Examples of docstrings as blocks of code: Markdown takes `>>>` for quotations."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:  # griffe hands more than is used
        if obj.docstring is not None:
            obj.docstring.value = _fenced(obj.docstring.value)


def _fenced(text: str) -> str:
    """Put fences around each example and its output, which end with an empty line.

    >>> print(_fenced("Add.\\n\\n>>> 1 + 1\\n2\\n\\nMore."))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    More.
    """
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
