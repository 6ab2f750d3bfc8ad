"""Glue computed beside the stages: what the batch alone decides, for guards, weights and measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from evenflow.graph.cutting.cut import glue_section
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.template import Template
from evenflow.runtime.program.rng import Streams
from evenflow.runtime.program.work import Work


class Glue:
    """Computes the values of a template, which depend on the batch alone, on one device."""

    def __init__(self, graph: Graph, model: torch.nn.Module, wanted: Template, device: torch.device) -> None:
        self._work = Work(
            glue_section(graph, wanted.refs),
            graph,
            model,
            device=device,
            streams=Streams(0, device),
            parameter_of=lambda name, _: model.get_parameter(name),
            places_of=lambda _: [],
            extra=wanted,
        )

    def values(self, batch: Mapping[int, torch.Tensor] | Sequence[torch.Tensor]) -> dict[int, Any]:
        """The values for a microbatch, of which `batch` has the tensors."""
        values = self._work.given(batch)
        with torch.no_grad():
            self._work.run(values)
        return values

    def filled(self, batch: Sequence[torch.Tensor]) -> Any:
        """The template with a microbatch's values."""
        return self._work.extra.fill(self.values(batch), {})
