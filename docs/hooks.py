"""What the site needs beyond MkDocs: pages link to files of the repository, and docstrings have examples.

On GitHub `../examples/gpt.py` leads to that file. In the site there is nothing above the pages, so each file
outside of docs/ that a page links to becomes a page too, and the link is bent to it.
"""

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
CHANGELOG = "CHANGELOG.md"
_ITEM = re.compile(r"(?P<indent> *)(?:[-*+]|\d+\.) ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, and each file outside of docs/ that a page links to."""
    root = Path(config.docs_dir).parent
    files.append(File.generated(config, CHANGELOG, content=(root / CHANGELOG).read_text()))
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
    folder = "" if page == CHANGELOG else posixpath.join("docs", posixpath.dirname(page))
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
    fence = "`" * 4
    return f"# {path}\n\n{fence}{_LANGUAGES.get(file.suffix, '')}\n{file.read_text()}{fence}\n"


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
