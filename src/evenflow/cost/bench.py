"""A bench: one node set up as a stage of its own, with parameters of its own, to be run as a stage runs it.

Everything that runs here is the runtime's: the node's code, how values enter a stage, how its backward is
taken in one piece or in two. What one stage pays once and not for each of its nodes (the entry of values, the
start of autograd's walk) is run without the node, too, and subtracted by whoever measures.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from evenflow.cost.inputs import random_like
from evenflow.graph.cutting.cut import Section
from evenflow.graph.kernels.fakes import buffers_copied
from evenflow.graph.leaves.snapshots import copy_of
from evenflow.graph.nouns.graph import Graph, Node
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.graph.python.modules import python_kept
from evenflow.runtime.program.kept import buffers_at
from evenflow.runtime.program.rng import Streams, generators_restored
from evenflow.runtime.program.work import Work
from evenflow.runtime.stages.inflight import InFlight
from evenflow.runtime.stages.stage import Stage

_BEFORE, _HERE, _AFTER = 0, 1, 2  # stages: what makes the inputs, the node, what uses the results
Places = Mapping[str, Sequence[tuple[torch.nn.Module, str]]]  # of parameters, by their first names


@dataclass(frozen=True, slots=True)
class Role:
    """What of a node's values the rest of the program has a hand in.

    `arriving` come from other nodes and `given` from the batch; `used` are results that others use, `graded`
    those of them whose gradient comes back, and `shared` inputs whose gradient later users add to.
    """

    arriving: tuple[int, ...]
    given: tuple[int, ...]
    used: tuple[int, ...]
    graded: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def all_graded(self) -> frozenset[int]:
        """All values of the node that gradients come back for."""
        return frozenset((*self.graded, *self.shared))


class Bench:
    """A node, its stage and its section, and the gradients that come back to it."""

    def __init__(
        self, node: Node, role: Role, graph: Graph, stage: Stage, section: Section, work: Work
    ) -> None:
        self.node, self.role, self._graph = node, role, graph
        self._stage, self._work = stage, work
        returns = section.gradient_receives.get(_AFTER, ())
        self.gives = bool(section.gradient_sends[_BEFORE])  # whether other nodes wait for gradients
        self._gradients = tuple(random_like(graph.values[value].info, stage.device) for value in returns)

    @property
    def walks(self) -> bool:
        """Whether any gradient comes back, so that there is a backward."""
        return bool(self._gradients)

    def forward(self, inputs: Mapping[int, torch.Tensor], *, splits: bool = False) -> InFlight:
        """Run the node forward, for a backward in one piece or in two."""
        flight = InFlight(self._work)
        flight.activations[_BEFORE] = tuple(inputs[value] for value in self.role.arriving)
        batch = {value: inputs[value] for value in self.role.given}
        self._stage.run_forward(flight, batch, step=0, microbatch=0, splits=splits)
        return flight

    def results(self, flight: InFlight) -> Mapping[int, torch.Tensor]:
        """What others use of what its forward made, by value."""
        return dict(zip(self.role.used, flight.made.get(_AFTER, ()), strict=True))  # type: ignore[arg-type]  # an activation always exists

    def arrive(self, flight: InFlight) -> None:
        """Let the gradients of its results be there, as others have just made them."""
        flight.owed.clear()
        flight.gradients[_AFTER] = tuple(map(copy_of, self._gradients))

    def backward(self, flight: InFlight) -> None:
        """Run its backward in one piece."""
        self._stage.run_backward(flight)

    def input_grad(self, flight: InFlight) -> None:
        """Run the part of its backward that others wait for."""
        self._stage.run_input_grad(flight)

    def weight_grad(self, flight: InFlight) -> None:
        """Run the rest of its backward."""
        self._stage.run_weight_grad(flight)


@dataclass(frozen=True, slots=True)
class Benches:
    """Sets benches up for the nodes of a graph, one at a time."""

    graph: Graph
    model: torch.nn.Module
    places: Places
    device: torch.device

    @contextlib.contextmanager
    def of(self, node: Node, role: Role) -> Iterator[tuple[Bench, Bench]]:
        """The node's bench and one that does the same without the node; its parameters live meanwhile."""
        node = dataclasses.replace(node, region=None)  # recomputation is added up from what is measured
        section = self._section(node, role)
        idle = dataclasses.replace(
            section,
            nodes=(),
            sends={},
            gradient_receives={_AFTER: section.gradient_sends[_BEFORE]},
            relayed=frozenset(section.gradient_sends[_BEFORE]),
            kept_buffers=frozenset(),
        )
        sections = (section, idle)
        with ready(self.graph, self.model, self.places, sections, self.device) as ((stage, _), works):
            full, empty = (Bench(node, role, self.graph, stage, work.section, work) for work in works)
            yield full, empty

    def _section(self, node: Node, role: Role) -> Section:
        values = self.graph.values
        changed = {values[old].storage for old, _ in node.rebinds}
        back = tuple(value for value in role.arriving if values[value].info.requires_grad)
        given = (*role.given, *role.arriving)
        return Section(
            stage=_HERE,
            nodes=(node,),
            batch=tuple((value, value) for value in role.given),
            receives={_BEFORE: role.arriving},
            sends={_AFTER: role.used},
            gradient_receives={_AFTER: (*role.graded, *role.shared)},
            gradient_sends={_BEFORE: back},
            relayed=frozenset(role.shared),
            cloned=frozenset(value for value in given if values[value].storage in changed),
            live=frozenset(),
            kept_buffers=frozenset(node.kept_buffers),
            needs_output=False,
        )


def places_of_parameters(model: torch.nn.Module) -> Places:
    """Where each parameter is held, under all of its names."""
    held: defaultdict[int, list[tuple[torch.nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                held[id(parameter)].append((module, key))
    named = model.named_parameters(remove_duplicate=False)
    return {name: held[id(parameter)] for name, parameter in named}


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """With gradients; the model, its buffers and all random generators are afterwards as they were."""
    with (
        python_kept(model),
        generators_restored([torch.device("cpu"), device]),
        buffers_copied(model, device),
        torch.enable_grad(),
    ):
        yield


@contextlib.contextmanager
def ready(
    graph: Graph,
    model: torch.nn.Module,
    places: Places,
    sections: Sequence[Section],
    device: torch.device,
    *,
    keeps_numbers: bool = False,
) -> Iterator[tuple[list[Stage], list[Work]]]:
    """Sections ready to run, each with its stage, on parameters of their own that live meanwhile."""
    streams = Streams(0, device)
    names = dict.fromkeys(name for section in sections for node in section.nodes for name in node.parameters)
    with _own_parameters(model, places, names, device, keeps_numbers=keeps_numbers) as parameters:
        try:
            stages = [
                Stage(section.stage, device, streams, lambda names: buffers_at(model, names))
                for section in sections
            ]
            works = [
                Work(
                    section,
                    graph,
                    model,
                    device=device,
                    streams=streams,
                    parameter_of=lambda name, _: parameters[name],
                    places_of=lambda name: list(places[name]),
                    deferral=stage.deferral,
                )
                for section, stage in zip(sections, stages, strict=True)
            ]
            yield stages, works
        finally:
            streams.unhook()


@contextlib.contextmanager
def _own_parameters(
    model: torch.nn.Module,
    places: Places,
    names: Iterable[str],
    device: torch.device,
    *,
    keeps_numbers: bool,
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Parameters on the device in the place of the model's own, which may have no memory.

    They have small random numbers, or, if it `keeps_numbers`, those of the model where it has some.
    """
    made = {}
    for name in names:
        own = model.get_parameter(name)
        if keeps_numbers and not own.is_meta:
            numbers = own.detach().to(device, copy=True)
        else:
            info = TensorInfo(tuple(own.shape), tuple(own.stride()), own.dtype, own.requires_grad)
            numbers = random_like(info, device)
        made[name] = torch.nn.Parameter(numbers, requires_grad=own.requires_grad)
        vars(made[name]).update(vars(own))
    before = [(m, k, m._parameters[k]) for name in made for m, k in places[name]]
    try:
        for name, parameter in made.items():
            for module, key in places[name]:
                module._parameters[key] = parameter
        yield made
    finally:
        for module, key, parameter_before in before:
            module._parameters[key] = parameter_before
