"""What a pipeline computes again in the backward: `pipeline(recompute=…)`, or what a plan says.

Without a plan, what recomputation frees and takes is estimated from the recording (`cost.estimate`), on the
device of one data sheet, so that every machine chooses the same.
"""

import fnmatch
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from evenflow.cluster.presets import device_called
from evenflow.cost.estimate import estimate
from evenflow.errors import ConfigError
from evenflow.graph.cutting.cut import Cut
from evenflow.graph.cutting.recomputable import Again, without_refused
from evenflow.graph.nouns.graph import Graph, Node
from evenflow.pipe.given.refuse import unknown_module
from evenflow.plan.chain import Chain
from evenflow.plan.choice import RECOMPUTE_NAMES as NAMES
from evenflow.plan.plan import Plan, node_labels
from evenflow.plan.recompute import all_worthwhile, by_worth, curve

_LOG = logging.getLogger("evenflow")

RecomputeChoice: TypeAlias = str | Sequence[str] | None
_DEVICE = "A100"  # whose rates decide what is cheap
_SHARE = 0.5  # of what "full" frees: what "selective" frees at least


def check_recompute(model: torch.nn.Module, recompute: RecomputeChoice) -> tuple[str, ...]:
    """Check `pipeline`'s argument; the modules that it names, for the recording to take their parents apart.

    Raises `ConfigError` for what is none of the names, and no pattern of any module's.
    """
    if recompute is None or recompute in NAMES:
        return ()
    if isinstance(recompute, str) or not all(isinstance(each, str) for each in recompute):
        raise ConfigError(
            f"recompute={recompute!r} is none of {', '.join(map(repr, NAMES))}, and no list of names or "
            f"patterns of modules{f': recompute=[{recompute!r}]' if isinstance(recompute, str) else ''}"
        )
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in recompute:
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matching and ":" not in pattern:
            raise unknown_module("recompute", pattern, names)
        found += [name for name in matching if not any(name.startswith(f"{each}.") for each in matching)]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Recompute:
    """Decides for each recording what its stages recompute. `tells`: whether this process logs it."""

    model: torch.nn.Module
    choice: RecomputeChoice
    plan: Plan | None
    tells: bool

    def __call__(self, made: Cut, *, first: bool) -> Again:
        """What a cut recording recomputes.

        Of the `first` one all that is named must be there, and allowed; of others, what is. Raises
        `ConfigError`.
        """
        graph = made.graph
        wanted = self._wanted(made, first=first)
        again, refused = without_refused(graph, set(wanted))
        named = self.choice not in (None, *NAMES) or (self.choice is None and self.plan is not None)
        for node, why in refused if first else ():
            if named and node.region is None:
                raise ConfigError(
                    f"{wanted[node.index]} {node.name}, which cannot be computed again in the backward: "
                    f"{why}; leave it out"
                )
        chooses = self.choice in ("selective", "full")
        if first and self.tells and (wanted or chooses):
            if chooses:  # what cannot be was never chosen
                _, refused = without_refused(graph, {node.index for node in graph.chain})
            _LOG.info("%s", "; ".join(_told(made, again, refused)))
        return again

    def _wanted(self, made: Cut, *, first: bool) -> dict[int, str]:
        """The nodes that are to be recomputed, by index, each with who says so."""
        graph = made.graph
        match self.choice:
            case None if self.plan is not None:
                return dict(_planned(self.plan, graph, strict=first))
            case None | "none":
                return {}
            case "full" | "selective" as how:
                places = _estimated(made, self.model, how)
                return {graph.chain[place].index: "" for place in places}
            case patterns:
                return dict(_named(patterns, graph, strict=first))


def _planned(plan: Plan, graph: Graph, *, strict: bool) -> Iterator[tuple[int, str]]:
    labels = node_labels([node.name for node in graph.chain])
    at = dict(zip(labels, graph.chain, strict=True))
    for number, stage in enumerate(plan.stages):
        for label in stage.recompute:
            if label in at:
                yield at[label].index, f"the plan's stage {number} recomputes"
            elif strict:
                raise ConfigError(
                    f"the plan's stage {number} recomputes {label!r}, which the recorded program does not "
                    "have: was the plan made for another model, or another batch? Plan again"
                )


def _named(patterns: Sequence[str], graph: Graph, *, strict: bool) -> Iterator[tuple[int, str]]:
    for pattern in patterns:
        found = [node for node in graph.chain if _is_of(node, pattern)]
        yield from ((node.index, f"recompute= names {pattern!r}, and so") for node in found)
        if not found and strict:
            raise ConfigError(
                f"recompute= names {pattern!r}, of which the recorded program has no node of its own: it was "
                "not called, depends on the batch alone, or is inside a module that stays whole; name that"
            )


def _is_of(node: Node, pattern: str) -> bool:
    """Whether a pattern matches a node's name, or a module that the node is or belongs to."""
    parts = node.name.partition(":")[0].split(".")
    paths = itertools.accumulate(parts, lambda path, part: f"{path}.{part}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in (node.name, *paths))


def _estimated(made: Cut, model: torch.nn.Module, how: str) -> list[int]:
    """The places in the chain of what "full" or "selective" means for each stage."""
    device = device_called(_DEVICE)
    rate = next(iter(device.flops_per_second))
    chain = estimate(made.graph, model, [device], num_rows=1, dtype=rate)
    if how == "full":
        return [*all_worthwhile(chain)]
    found: list[int] = []
    for start, end in itertools.pairwise((0, *made.positions, chain.num_nodes)):
        found += _cheapest(chain, range(start, end), device.name)
    return found


def _cheapest(chain: Chain, stage: range, kind: str) -> set[int]:
    """Of a stage's nodes those that free most in a second, until half of what can be freed is."""
    may = tuple(allowed and place in stage for place, allowed in enumerate(chain.recomputable))
    own = replace(chain, recomputable=may)
    enough = _SHARE * curve(own, kind)[0][-1]
    found: set[int] = set()
    freed: dict[tuple[int, ...], float] = {}
    for unit in by_worth(own, kind):
        if sum(freed.values()) >= enough:
            break
        if not found.issuperset(unit.nodes):
            inside = [nodes for nodes in freed if set(nodes) <= set(unit.nodes)]
            for nodes in inside:
                del freed[nodes]
            freed[unit.nodes] = unit.freed_bytes
            found.update(unit.nodes)
    return found


def _told(made: Cut, again: Again, refused: Iterable[tuple[Node, str]]) -> Iterator[str]:
    for section in made.sections:
        names = [node.name for node in section.nodes if node.index in again.nodes]
        yield f"stage {section.stage} recomputes {len(names)} of {len(section.nodes)} nodes"
    others = [f"{node.name} ({why})" for node, why in refused]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield f"not recomputed: {', '.join(others[:3])}{more}"
