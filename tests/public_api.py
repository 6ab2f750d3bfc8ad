"""What is public in Evenflow, as text: names, their signatures as the source has them, and commands' flags.

`python tests/public_api.py > docs/api.txt` writes down a change that is meant.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from evenflow.cli.main import app

SOURCE = Path(__file__).parents[1] / "src"
LISTING = Path(__file__).parents[1] / "docs" / "api.txt"

# The modules that may be imported, and which of their names; None for all in `__all__`.
PUBLIC: dict[str, tuple[str, ...] | None] = {
    "evenflow": None,
    "evenflow.ir": None,
    "evenflow.schedules.catalog": (
        "AUTO",
        "NAMES",
        "SCHEDULES",
        "ScheduleFunction",
        "default_stages_per_rank",
        "get",
        "make",
    ),
    "evenflow.schedules.auto": ("Best", "best", "best_on"),
    "evenflow.rules": ("dependencies",),
    "evenflow.schedule_file": ("format_schedule", "parse_schedule"),
    "evenflow.simulate": ("simulate",),
    "evenflow.memory": ("memory_curve", "memory_faults", "peak_bytes"),
    "evenflow.critical_path": ("critical_path",),
    "evenflow.bill": ("Bill", "Ran", "bills"),
    "evenflow.bounds_of": ("bounds_of",),
    "evenflow.lower": ("lower",),
    "evenflow.validate": ("ProvenProgram", "prove"),
    "evenflow.cost_table": ("CostTable", "LayerTimes", "RankTimes", "price", "read_cost_table"),
    "evenflow.cluster.cluster": ("Cluster", "Host"),
    "evenflow.cluster.read": ("read_cluster",),
    "evenflow.cluster.short": ("parse_cluster",),
    "evenflow.cluster.write": ("format_cluster", "write_cluster"),
    "evenflow.plan.chain": ("Chain", "Handed", "Held", "Parameter", "Seconds"),
    "evenflow.plan.request": ("Levers", "Request"),
    "evenflow.plan.rank_memory": ("TrainingState",),
    "evenflow.plan.planner": ("NoPlanError", "plan"),
    "evenflow.plan.plan": (
        "Degrees",
        "Plan",
        "PlannedLink",
        "PlannedRank",
        "PlannedStage",
        "Prediction",
        "RunnerUp",
    ),
    "evenflow.plan.plan_file": ("read_plan", "read_plan_file", "write_plan"),
    "evenflow.journal.folder": ("read_plan_of", "read_run", "read_steps"),
    "evenflow.journal.run": ("RankRecord", "Run", "Spread", "StageRecord", "Step"),
    "evenflow.view.picture": ("draw_timelines",),
    "evenflow.view.schedule_picture": ("draw_schedule_picture",),
    "evenflow.view.text": ("draw_schedule", "draw_timeline"),
    "evenflow.pipe.state": ("merged",),
}


def listing() -> str:
    """All public names, module by module, and then the commands."""
    lines = [line for module in PUBLIC for line in _module(module)]
    return "\n".join([*lines, *_commands("evenflow", typer.main.get_command(app))]) + "\n"


def _commands(name: str, command: Any) -> Iterator[str]:  # typer's classes, which have no public home
    yield f"$ {name}"
    for parameter in command.params:
        yield f"    {' '.join(parameter.opts) if parameter.opts[0][0] == '-' else parameter.name.upper()}"
    for each in getattr(command, "commands", {}).values():
        yield from _commands(f"{name} {each.name}", each)


def _module(module: str) -> Iterator[str]:
    names = PUBLIC[module]
    yield f"{module}"
    for name in sorted(_listed(module) if names is None else names):
        for line in _told(name, *_found(module, name)):
            yield f"    {line}"


def _tree(module: str) -> ast.Module:
    path = SOURCE / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def _listed(module: str) -> list[str]:
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{module} has no __all__")


def _found(module: str, name: str) -> tuple[str, ast.stmt]:
    """The module in which a name is defined, followed through imports, and its definition."""
    for node in ast.walk(_tree(module)):
        match node:
            case ast.ImportFrom(module=str(home), names=names) if any(
                (each.asname or each.name) == name for each in names
            ):
                return _found(home, name)
            case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                return module, node
            case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                return module, node
            case ast.AnnAssign(target=ast.Name(id=target)) if target == name:
                return module, node
    raise ValueError(f"{module} has no {name}")


def _told(name: str, module: str, node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef():
            yield _function(node)
        case ast.ClassDef(bases=bases):
            shown = ", ".join(base for base in map(ast.unparse, bases) if base[0] != "_")
            yield f"class {name}({shown})" if shown else f"class {name}"
            for line in _members(module, node):
                yield f"    {line}"
        case ast.AnnAssign(annotation=ast.Name(id="TypeAlias")):
            yield ast.unparse(node)
        case ast.AnnAssign(annotation=annotation):
            yield f"{name}: {ast.unparse(annotation)}"
        case _:
            yield name


def _members(module: str, node: ast.ClassDef) -> Iterator[str]:
    """Those of a class and, after them, of the classes of ours that it is made of."""
    for member in node.body:
        yield from _member(member)
    tree = _tree(module)
    imports = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)]
    homes = {each.name: module for each in tree.body if isinstance(each, ast.ClassDef)}
    homes |= {alias.name: str(each.module) for each in imports for alias in each.names}
    for base in map(ast.unparse, node.bases):
        if homes.get(base, "").startswith("evenflow"):
            home, found = _found(homes[base], base)
            assert isinstance(found, ast.ClassDef), "a class is made of classes"
            yield from _members(home, found)


def _member(node: ast.stmt) -> Iterator[str]:
    """A field or a method of a class, where it is public."""
    match node:
        case ast.FunctionDef(name=name) if name in {"__init__", "__enter__", "__call__"} or name[0] != "_":
            yield _function(node)
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]) if (
            name[0] != "_"
        ):
            yield ast.unparse(node)


def _function(node: ast.FunctionDef) -> str:
    decorators = [ast.unparse(each) for each in node.decorator_list]
    kind = "".join(f"@{each} " for each in decorators if each in {"property", "classmethod", "staticmethod"})
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{kind}def {node.name}({ast.unparse(node.args)}){returned}"


if __name__ == "__main__":
    sys.stdout.write(listing())
