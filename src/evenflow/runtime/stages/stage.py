"""A stage: owns the parameters of its nodes and runs them. Knows no rank and no link."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from evenflow.ir.op import Payload
from evenflow.runtime.links.link import Parcel
from evenflow.runtime.program.backward import Walk, receive, root_of
from evenflow.runtime.program.deferral import Deferral
from evenflow.runtime.program.kept import kept_as_left
from evenflow.runtime.program.offload import Away, Offload
from evenflow.runtime.program.rng import Streams
from evenflow.runtime.stages.inflight import InFlight


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one, for code that says `cuda` without a number."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def zeros_at(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that lie in memory as the tensor does.

    >>> zeros_at(torch.ones(1).expand(3)).stride()
    (0,)
    """
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in pairs)
    return tensor.new_zeros(length).as_strided(tensor.shape, tensor.stride())


class Stage(torch.nn.Module):
    """One stage on one device.

    Its parameters carry the model's own names with `/` for `.`, since torch allows no dots in names.
    """

    def __init__(
        self,
        index: int,
        device: torch.device,
        streams: Streams,
        buffers_at: Callable[[Iterable[str]], list[torch.Tensor]],  # finds the model's buffers by name
        offload: Offload | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.device = device
        self._current = partial(on, device) if device.type == "cuda" else nullcontext  # `type` takes 10 us
        self.streams = streams
        self.deferral = Deferral(device)
        self._anchor = torch.empty(0, device=device, requires_grad=True)  # where graphs end
        self.buffers_at, self.offload = buffers_at, offload

    def own(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Take parameters, by the model's names, and move them to the stage's device."""
        for name, parameter in parameters.items():
            parameter.data = parameter.data.to(self.device)
            self.register_parameter(name.replace(".", "/"), parameter)

    def run_forward(
        self,
        flight: InFlight,
        batch: Mapping[int, torch.Tensor],
        *,
        step: int,
        microbatch: int,
        splits: bool = False,
    ) -> None:
        """Run one microbatch forward; if gradients are on, for a backward, in two parts if it `splits`.

        For `batch` see `Work.given`.
        """
        with self._current():
            if splits:
                self.deferral.into = flight.put_off
            self._forward(flight, batch, step, microbatch, splits=splits and flight.work.gives)

    def _forward(
        self, flight: InFlight, batch: Mapping[int, torch.Tensor], step: int, microbatch: int, *, splits: bool
    ) -> None:
        work, section, train = flight.work, flight.work.section, torch.is_grad_enabled()
        values = work.given(batch)
        for source, expected in work.entering:
            for (value, wants), arrived in zip(expected, flight.activations.pop(source), strict=True):
                assert arrived is not None, "an activation always exists"
                values[value] = self._enter(flight, value, arrived, wants=wants and train)
        if work.draws:
            self.streams.begin(step, microbatch)
        looks = train and (section.kept_buffers or self.offload is not None)
        with self._keeping(flight, values) if looks else nullcontext():
            work.run(values, put_off=splits)
        for value in section.live:
            if value in values:
                values[value] = values[value].clone()
        for value in work.awaited if train else ():
            if value not in flight.roots:
                flight.roots[value] = root_of(values[value])
        flight.made = {
            target: tuple(values[value].detach() for value in group)
            for target, group in section.sends.items()
        }
        if section.needs_output:
            flight.output = work.output(values)

    @contextmanager
    def _keeping(self, flight: InFlight, given: Mapping[int, Any]) -> Iterator[None]:
        """What lets the backward find buffers as this forward leaves them, and moves what it saves away.

        `given` is what the forward begins with.
        """
        section, constants = flight.work.section, flight.work.graph.constants
        names = section.kept_buffers
        own = [constants[name] for name in names & constants.keys()]
        own += self.buffers_at(names - constants.keys())
        if self.offload is None:
            with kept_as_left(own):
                yield
            return
        used = {name for node in section.nodes for name in node.buffers}
        there = [*flight.work.parameters, *self.buffers_at(used - constants.keys())]
        there += [constants[name] for name in used & constants.keys()]
        batch = {value for _, value in section.batch} - section.cloned
        away = Away(self.offload, fixed=(*there, *(given[value] for value in batch)))
        with away.leaving(), kept_as_left(own, others=away) if names else away.hooks():
            yield
        flight.away = away

    def fetch(self, flight: InFlight) -> None:
        """Begin to bring back what the backward that is next takes."""
        if flight.away is not None:
            flight.away.bring_back()

    def _enter(self, flight: InFlight, value: int, arrived: torch.Tensor, *, wants: bool) -> torch.Tensor:
        """A received value as the section may use it; whether it `wants` a gradient."""
        section = flight.work.section
        tensor = arrived
        if wants:
            tensor = receive(arrived, value, flight.owed, self._anchor)
            if value in section.relayed:
                flight.roots[value] = root_of(tensor)
        return tensor.clone() if value in section.cloned else tensor

    def run_backward(self, flight: InFlight) -> None:
        """Run one microbatch backward: from gradients that arrived and, on the last stage, from its loss."""
        if flight.weighs_nothing:
            self._send_zeros(flight)
        else:
            self.fetch(flight)
            self._walk(flight).run()

    def run_input_grad(self, flight: InFlight) -> None:
        """Run the part of `run_backward` that makes gradients for other stages.

        What a microbatch that was run forward with `splits` leaves for `run_weight_grad`: the gradients of
        weights that can be put off; where no other stage waits for a gradient, all.
        """
        if flight.work.gives or flight.weighs_nothing:
            self.run_backward(flight)
        else:
            flight.walk = self._walk(flight)

    def run_weight_grad(self, flight: InFlight) -> None:
        """Run what `run_input_grad` left of a microbatch's backward."""
        with self._current():
            flight.put_off.run()
        if flight.walk is not None:
            self.fetch(flight)
            flight.walk.run()
            flight.walk = None

    def _walk(self, flight: InFlight) -> Walk:
        roots: list[GradientEdge] = []
        gradients = []
        for source, expected in flight.work.section.gradient_receives.items():
            for value, gradient in zip(expected, flight.gradients.pop(source), strict=True):
                # What came out of an unseen operation only may have a graph.
                root = flight.roots[value]
                if gradient is not None and root is not None:
                    roots.append(root)
                    gradients.append(gradient)
        if flight.loss is not None and (root := root_of(flight.loss)) is not None:
            roots.append(root)
            gradients.append(torch.full_like(flight.loss, flight.weight))
        flight.roots, flight.output, flight.loss = {}, None, None
        return Walk(roots, gradients)

    def _send_zeros(self, flight: InFlight) -> None:
        """The backward of a microbatch that weighs nothing: the mean of no tokens would make it NaN."""
        walk = self._walk(flight)
        if walk.roots and flight.work.gives:
            walk.run_to([self._anchor])
            flight.put_off.drop()
            flight.owed.update((value, zeros_at(gradient)) for value, gradient in list(flight.owed.items()))

    def outgoing(self, flight: InFlight, target: int, payload: Payload) -> Parcel:
        """What leaves for another stage."""
        section = flight.work.section
        if payload is Payload.ACTIVATION:
            return flight.made.pop(target, ())
        return tuple(flight.owed.pop(value, None) for value in section.gradient_sends.get(target, ()))
