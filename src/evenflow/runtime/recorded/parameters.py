"""Who owns which parameter, and the accumulators of those that several stages share.

A parameter that one stage uses belongs to that stage. A *shared* one (a tied embedding and head, say) belongs
to the stage that uses it first; every other stage that uses it has an accumulator of its own, a parameter
over the same numbers, because autograd adds into `.grad` and the order of those additions would depend on
the schedule. Before an update the accumulators are added to the owner's gradient in one fixed order. With
`exact`, there is one accumulator per *use*, on one stage too, so that every cut adds the same terms in the
same order; the price is their memory.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from evenflow.graph.cutting.cut import Cut
from evenflow.graph.nouns.dtensors import local_part
from evenflow.graph.nouns.graph import Node


@dataclass(frozen=True, slots=True, order=True)
class Use:
    """One accumulator of a shared parameter. `index` orders the sum: the use with `exact`, else the stage."""

    name: str
    index: int
    stage: int


def parameters_by_name(model: torch.nn.Module, first_names: dict[str, str]) -> dict[str, torch.nn.Parameter]:
    """The model's distinct parameters under their first names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return {name: found[name] for name in dict.fromkeys(first_names.values())}


def stages_of_parameters(cut: Cut) -> dict[str, tuple[int, ...]]:
    """For each parameter that the program uses: the stages that do, ascending."""
    users: defaultdict[str, set[int]] = defaultdict(set)
    for section in cut.sections:
        for node in section.nodes:
            for name in node.parameters:
                users[name].add(section.stage)
    return {name: tuple(sorted(stages)) for name, stages in users.items()}


class Accumulators:
    """The shared parameters of one process. `uses` grows with every recording, alike on every rank."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], devices: tuple[torch.device, ...], *, exact: bool
    ) -> None:
        self._parameters, self._devices, self._exact = parameters, devices, exact
        self._objects: dict[Use, torch.nn.Parameter] = {}
        self.owner: dict[str, int] = {}  # shared parameter -> the stage that owns it
        self.uses: dict[str, list[Use]] = {}

    def learn(self, cut: Cut) -> dict[tuple[int, str], Use]:
        """Take in a recording; returns which accumulator serves each (node, shared parameter)."""
        places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)  # name -> (node, stage)
        for section in cut.sections:
            for node in section.nodes:
                for name in node.parameters:
                    places[name].append((node.index, section.stage))
        serving: dict[tuple[int, str], Use] = {}
        for name, found in places.items():
            stages = {stage for _, stage in found}
            if name not in self.owner and len(stages if not self._exact else found) < 2:
                continue
            self.owner.setdefault(name, min(stages))
            for ordinal, (at, stage) in enumerate(sorted(found)):
                use = Use(name, ordinal if self._exact else stage, stage)
                serving[at, name] = use
                known = self.uses.setdefault(name, [])
                if use not in known:
                    known.append(use)
                    known.sort()
        return serving

    @property
    def stage_of_use(self) -> dict[tuple[str, int], int]:
        """With `exact`: for each use of a shared parameter, the one stage on which all recordings have it.

        Microbatches then add up in each use alike for every cut, however many uses each of them has.
        """
        uses = (use for known in self.uses.values() for use in known) if self._exact else ()
        return {(use.name, use.index): use.stage for use in uses}

    def object_for(self, use: Use) -> torch.nn.Parameter:
        """The accumulator: the parameter itself for its first use, else another over the same numbers."""
        parameter = self._parameters[use.name]
        if use == self.uses[use.name][0] and use.stage == self.owner[use.name]:
            return parameter
        if use not in self._objects:
            data = parameter.detach().to(self._devices[use.stage])
            self._objects[use] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        return self._objects[use]

    def parameter_of(self, serving: dict[tuple[int, str], Use], name: str, node: Node) -> torch.nn.Parameter:
        """The object that stands for a parameter in a node."""
        use = serving.get((node.index, name))
        return self._parameters[name] if use is None else self.object_for(use)

    def aliases(self, name: str) -> Iterable[tuple[Use, torch.nn.Parameter]]:
        """This process's accumulators of a shared parameter, other than the parameter itself, in order."""
        return [(use, self._objects[use]) for use in self.uses[name] if use in self._objects]

    def named(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """All parameters that programs use here, and then the accumulators that stand for them."""
        yield from self._parameters.items()
        yield from ((use.name, alias) for use, alias in self._objects.items())

    def copies(self) -> list[torch.nn.Parameter]:
        """All of this process's accumulators, other than the parameters themselves."""
        return list(self._objects.values())

    def publish(self, name: str) -> None:
        """After an update, give the new numbers to accumulators that have a copy of their own."""
        parameter = self._parameters[name]
        for _, alias in self.aliases(name):
            if local_part(alias).data_ptr() != local_part(parameter).data_ptr():
                alias.data.copy_(parameter.data)

    def refresh(self) -> None:
        """Let accumulators follow a parameter that was frozen, or got other memory (`parameter.data = …`)."""
        for use, alias in self._objects.items():
            parameter = self._parameters[use.name]
            alias.requires_grad_(parameter.requires_grad)
            is_other = local_part(alias).data_ptr() != local_part(parameter).data_ptr()
            if alias.device == parameter.device and is_other:
                alias.data = parameter.data

    def parameter(self, name: str) -> torch.nn.Parameter:
        """The parameter that this process keeps under a shared name, owner or not."""
        return self._parameters[name]

    def clear(self) -> None:
        """Forget all gradients held here."""
        for alias in self._objects.values():
            alias.grad = None
