"""The limits of the house (CONTRIBUTING.md): sizes, annotations, cycles of imports, public docstrings."""

import ast
import importlib
import inspect
import itertools
import re
import statistics
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from public_api import PUBLIC

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
# What is longer says why in a comment that begins so: in the file's first lines, or right above the function.
REASON = "# long: "


@cache
def lines_of(path):
    return path.read_text().splitlines()


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def functions():
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def length(function):
    return function.end_lineno - function.lineno + 1


def says_why(path, function):
    first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
    before = reversed(lines_of(path)[: first - 1])
    above = itertools.takewhile(lambda line: line.lstrip().startswith("#"), before)
    return any(line.lstrip().startswith(REASON) for line in above)


def test_files_are_short():
    long = [
        str(path.relative_to(SOURCE))
        for path in FILES
        if len(lines_of(path)) > 450 and not any(line.startswith(REASON) for line in lines_of(path)[:40])
    ]
    assert not long, "divide them by what they are about, or say why not: # long: ..."
    assert statistics.median(len(lines_of(path)) for path in FILES) <= 150


def test_functions_are_short():
    long = [
        f"{path.relative_to(SOURCE)}: {function.name}"
        for path, function in functions()
        if length(function) > 80 and not says_why(path, function)
    ]
    assert not long, "divide them by what they do, or say why not, right above: # long: ..."
    assert statistics.median(length(function) for _, function in functions()) <= 10


def test_everything_is_annotated():
    bare = []
    for path, function in functions():
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        told = [each.annotation for each in arguments if each is not None and each.arg not in ("self", "cls")]
        if None in [*told, function.returns]:
            bare.append(f"{path.relative_to(SOURCE)}: {function.name}")
    assert not bare


def module_of(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imported(tree, modules):
    """What a module imports, inside functions too; what is for the type checker alone does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in modules else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        yield from imported(node, modules)


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_of(path): path for path in FILES}
    # The package's own face looks its names up on first use: who imports it imports nothing.
    imports = {
        module: set(imported(tree_of(path), modules)) & modules.keys() - {module, "evenflow"}
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1]))


def public_things():
    found = []
    for module, names in PUBLIC.items():
        home = importlib.import_module(module)
        for name in names or home.__all__:
            thing = getattr(home, name)
            if callable(thing) and getattr(thing, "__doc__", None):
                found.append(pytest.param(thing, id=f"{module}.{name}"))
    return found


def methods_of(thing):
    """The public methods and properties that a class has of its own; none of what is no class."""
    if not inspect.isclass(thing):
        return []
    return [
        function
        for name, each in vars(thing).items()
        if not name.startswith("_")
        if inspect.isfunction(function := each.fget if isinstance(each, property) else each)
        and function.__module__.startswith("evenflow.")
    ]


EXAMPLES = "\n".join(
    line
    for parameter in public_things()
    for each in [parameter.values[0], *methods_of(parameter.values[0])]
    for line in (inspect.getdoc(each) or "").splitlines()
    if line.lstrip().startswith((">>>", "..."))
)


@pytest.mark.parametrize("thing", public_things())
def test_public_docstrings_say_what_is_raised_and_show_an_example(thing):
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    # Its own, or that of something public that makes one of it.
    assert ">>>" in inspect.getdoc(thing) or f"{thing.__name__}(" in EXAMPLES, "an example that runs"
    for each in methods_of(thing) or [thing]:
        told = inspect.getdoc(each) or ""
        raised = re.findall(r"^\s+raise (\w+Error)\(", inspect.getsource(each), re.MULTILINE)
        missing = [name for name in set(raised) if name not in told]
        assert not missing, f"{each.__qualname__} raises {missing} and does not say so"


@pytest.mark.parametrize("thing", public_things())
def test_public_docstrings_tell_every_argument(thing):
    """Those that have a section of arguments tell all of them, by the names that they have."""
    for each in [thing, *methods_of(thing)]:
        text = inspect.getdoc(each) or ""
        section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", text, re.DOTALL | re.MULTILINE)
        if section is None:
            continue
        told = set(re.findall(r"^    \*{0,2}(\w+)", section[1], re.MULTILINE)) | set(
            re.findall(r"(\w+)[,:]", section[1])
        )
        assert {name for name in inspect.signature(each).parameters if name != "self"} <= told
