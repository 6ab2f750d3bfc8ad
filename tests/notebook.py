"""A notebook run cell by cell in this process, without Jupyter: what its tests compare with what is in it.

    python tests/notebook.py examples/tour.ipynb       # run it, and write down what its cells show

A cell shows what it prints and, as in Jupyter, what its last line comes to: as a PNG where that has one, else
as text.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def run(notebook):
    """The outputs of each cell of code, in the notebook's own form."""
    names = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_outputs(source(cell), number, names) for number, cell in enumerate(cells, start=1)]


def _outputs(text, number, names):
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        outputs.append(
            {
                "data": _shown(value),
                "execution_count": number,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


def _shown(value):
    if hasattr(value, "_repr_png_"):
        png = base64.b64encode(value._repr_png_()).decode("ascii")
        return {"image/png": png, "text/plain": [type(value).__name__]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


def write(path):
    """Run a notebook, and write it again with what its cells show."""
    notebook = read(path)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run(notebook), strict=True), start=1):
        cell["execution_count"], cell["outputs"] = number, outputs
    Path(path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
