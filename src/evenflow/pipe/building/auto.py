"""`pipeline(plan="auto")`: the run measures itself, and the planner decides what nobody has."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from evenflow.cost.cache import user_folder
from evenflow.errors import ConfigError, RecordError
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.plan.choice import describe
from evenflow.plan.plan import Plan
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.ranks.world import World
from evenflow.runtime.recorded.microbatch import Microbatches
from evenflow.schedules import catalog

_LOG = logging.getLogger("evenflow")

_AUTO = "auto"
_LEVERS = ("stages_per_rank", "schedule", "microbatch_size", "recompute")  # what the planner takes as given


def planned(
    plan: Plan | str | None,
    levers: dict[str, Any],
    mesh: Mesh,
    device: torch.device,
    *,
    run: Run,
    exact: bool,
) -> tuple[Plan | None, dict[str, Any]]:
    """The plan and the levers of a run, where it is to plan itself with that plan and none of the levers.

    It is where that is asked for, and where several processes are told nothing. `levers` are `pipeline`'s.
    Collective. Raises `ConfigError` for what cannot be planned,
    `RecordError` where the model cannot be recorded.
    """
    if isinstance(plan, Plan):
        return plan, levers
    said = [name for name, value in levers.items() if value is not None]
    world = mesh.world
    if not mesh.is_whole:
        if plan == _AUTO:
            raise ConfigError(
                'mesh= and plan="auto" are both given, and a run plans itself for a pipeline alone: leave '
                "one of them out, or write a plan with evenflow plan"
            )
        return None, levers
    whole = not exact and not isinstance(run.example, Microbatches)
    if plan == _AUTO:
        _check_planned(said, levers, whole=whole)
    elif said or not whole:
        return None, levers
    if world.size == 1:  # nothing can be gained
        return None, levers
    asked = {name: levers[name] for name in _LEVERS}
    if asked["schedule"] == catalog.AUTO:  # the planner searches, too
        asked["schedule"] = None
    try:
        within = Levers(pipeline=world.size, **asked).pipeline_only()
        made = _planned(replace(run, levers=within), world, device)
    except RecordError as error:
        if plan == _AUTO:
            raise
        _LOG.warning("not planned, and cut by estimates: %s", error)
        return None, levers
    return made, dict.fromkeys(levers)


def _check_planned(said: Sequence[str], levers: Mapping[str, Any], *, whole: bool) -> None:
    for name in said:
        if name not in _LEVERS or not isinstance(levers[name], int | str):
            raise ConfigError(
                f'{name}= and plan="auto" are both given, and the plan decides that: leave one of them out '
                f"(a plan takes {', '.join(_LEVERS)} as given)"
            )
    if not whole:
        raise ConfigError(
            'plan="auto" cannot plan exact=True or a batch of ready Microbatches: leave the plan out'
        )


def _planned(run: Run, world: World, device: torch.device) -> Plan:
    """Measure the run on its own processes, and plan it; collective. Measurements are kept for the next time.

    Raises `ConfigError` for what cannot be planned, `RecordError` where the model cannot be recorded.
    """

    def tell(text: str) -> None:
        if world.rank == 0:
            _LOG.info("%s", text)

    request = measured_request(run, world, device, cache=user_folder(), progress=tell)
    tell("planning")
    found: Plan | ConfigError | None = None
    if world.rank == 0:
        try:
            found = plan(request)
        except ConfigError as error:
            found = ConfigError(str(error))
    made = world.share(found, 0)
    if isinstance(made, ConfigError):
        raise made
    assert isinstance(made, Plan), "the first rank has made one"
    tell(f"planned: {describe(made.choice)}, {made.prediction.step_seconds:.3g} s a step expected")
    return made
