"""A plan as TOML that a person can read and edit. It is data: reading runs nothing, and checks every value.

Each class of `plan.py` is a table, each of its fields a key. What decides stands first (degrees, schedule,
sizes, the stages' first nodes and what they recompute); what is predicted may be left as it is.
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from evenflow.errors import ConfigError
from evenflow.foreign import parse_toml, read_toml, shown
from evenflow.plain_data import read_as
from evenflow.plan.own_order import own_schedule
from evenflow.plan.plan import Plan
from evenflow.schedules import catalog

_VERSION = 1
_HEADER = """\
# A plan of Evenflow. Stages begin with the node called "first" and end before the next stage's; seconds and
# bytes are of one microbatch. After a change of [[stages]] the predictions are those of the plan before it.
# Where there is an "order", it is what each rank runs: stage, F, B (or its halves I and W), microbatch.
# "layers" are the first nodes of the repeated blocks, and the node behind them: other systems cut only there.
"""


def write_plan(plan: Plan) -> str:
    """Return the text of a plan; the inverse of `read_plan`.

    >>> from evenflow.plan.choice import Degrees
    >>> from evenflow.plan.plan import PlannedRank, PlannedStage, Prediction
    >>> from evenflow.plan.rank_memory import RankMemory
    >>> stage = PlannedStage(0, "embedding", 3, (), 1.0, 1.0, 1.0, 0.0)
    >>> rank = PlannedRank("RTX 4090", 0, RankMemory(*[2.0**20] * 7), 2.0**30, 0.0)
    >>> told = Prediction(12.0, 12.0, 0.0, 0.0, 12.0, 64.0, mfu=None)
    >>> made = Plan(Degrees(), "1f1b", 1, 2, 4, 0.05, (stage,), (rank,), told)
    >>> read_plan(write_plan(made)) == made
    True
    """
    lines = [_HEADER + f"version = {_VERSION}"]
    tables = []
    for field in fields(plan):
        value = getattr(plan, field.name)
        if is_dataclass(value):
            tables += ["", f"[{field.name}]", *_keys(value)]
        elif isinstance(value, tuple) and all(map(is_dataclass, value)):
            for each in value:
                tables += ["", f"[[{field.name}]]", *_keys(each)]
        elif isinstance(value, tuple):
            lines += [f"{field.name} = [", *(f"  {_written(row)}," for row in value), "]"]
        else:
            lines.append(f"{field.name} = {_written(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _keys(value: Any) -> list[str]:  # value: a dataclass
    given = ((field.name, getattr(value, field.name)) for field in fields(value))
    return [f"{name} = {_written(each)}" for name, each in given if each is not None]


def _written(value: Any) -> str:  # value: a number, a string, a tuple of strings, a dataclass
    if is_dataclass(value):
        return f"{{ {', '.join(_keys(value))} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def read_plan(text: str) -> Plan:
    """Read a plan from its text.

    Raises `ConfigError` for what is no TOML, for a key that is unknown or missing, for a value of the wrong
    type or out of range, and for what contradicts itself, each with its place in the file. Whether the plan
    fits a model is judged where it is run.

    >>> read_plan("version = 0")
    Traceback (most recent call last):
    ...
    evenflow.errors.ConfigError: version = 0: this Evenflow reads plans of version 1; plan again
    """
    return _plan(parse_toml(text))


def _plan(content: dict[str, object]) -> Plan:
    version = content.get("version")
    if version != _VERSION:
        raise ConfigError(
            f"version = {shown(version)}: this Evenflow reads plans of version {_VERSION}; plan again"
        )
    decided = {key: value for key, value in content.items() if key != "version"}
    plan = read_as(Plan, decided, _least)
    num_ranks = plan.degrees.pipeline
    if len(plan.ranks) != num_ranks:
        raise ConfigError(
            f"[[ranks]] names {len(plan.ranks)} pipeline ranks, and degrees.pipeline = {num_ranks}"
        )
    if len(plan.stages) != num_ranks * plan.stages_per_rank:
        raise ConfigError(
            f"[[stages]] names {len(plan.stages)} stages, and {num_ranks} ranks of {plan.stages_per_rank} "
            f"stages hold {num_ranks * plan.stages_per_rank}"
        )
    own_schedule(plan)  # raises for an order that is wrong
    _check_ranks(plan)
    if plan.max_leaf_share > 1:
        raise ConfigError(f"max_leaf_share = {plan.max_leaf_share} is a share: it must be at most 1")
    return plan


def _check_ranks(plan: Plan) -> None:
    """Refuse a schedule that there is not, and stages and links of ranks that there are not."""
    num_ranks = plan.degrees.pipeline
    if not plan.order:
        catalog.get(plan.schedule)
    for number, stage in enumerate(plan.stages):
        if stage.rank >= num_ranks:
            raise ConfigError(f"stages[{number}].rank = {stage.rank}, and ranks are 0 to {num_ranks - 1}")
    used = {stage.rank for stage in plan.stages}
    if len(used) < num_ranks:
        raise ConfigError(f"degrees.pipeline = {num_ranks} ranks, and the stages are on {len(used)} of them")
    known = set[tuple[int, int]]()
    for number, link in enumerate(plan.links):
        pair = (link.source, link.target)
        if max(pair) >= num_ranks or pair[0] == pair[1] or pair in known:
            raise ConfigError(
                f"links[{number}] leads from rank {pair[0]} to rank {pair[1]}: there is one link at most "
                f"between any two of the ranks 0 to {num_ranks - 1}"
            )
        known.add(pair)


def read_plan_file(path: Path) -> Plan:
    """Read a plan from a file; `ConfigError` as `read_plan`, and for a file that can't be read.

    >>> read_plan_file(Path("none.toml"))
    Traceback (most recent call last):
    ...
    evenflow.errors.ConfigError: cannot read the plan none.toml: No such file or directory
    """
    content = read_toml(path, "plan")
    try:
        return _plan(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _least(kind: type[int] | type[float], place: str) -> float:
    return 1 if kind is int and not place.endswith((".rank", ".place", ".source", ".target")) else 0
