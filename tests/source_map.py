"""The map of the source, as text: every package and file, with the first line of its docstring.

`python tests/source_map.py > docs/map.txt` writes it down.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
MAP = Path(__file__).parents[1] / "docs" / "map.txt"


def source_map() -> str:
    """The map as docs/map.txt has it."""
    return "\n".join(_lines(SOURCE / "evenflow", "")) + "\n"


def _lines(package: Path, indent: str) -> Iterator[str]:
    yield f"{indent}{package.name}/  {_first_line(package / '__init__.py')}"
    indent += "    "
    for path in sorted(package.glob("*.py")):
        if not path.stem.startswith("__"):
            yield f"{indent}{path.stem}: {_first_line(path)}"
    for inner in sorted(path.parent for path in package.glob("*/__init__.py")):
        yield from _lines(inner, indent)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None, f"{path} has no docstring"
    return text.partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(source_map())
