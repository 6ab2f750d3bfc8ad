"""Transfers: how many results cross from one rank to another in a step, and how big they are."""

from dataclasses import dataclass

from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Forward, InputGrad
from evenflow.ir.schedule import Schedule
from evenflow.rules import carriers, dependencies


@dataclass(frozen=True, slots=True)
class Transfers:
    """The transfers of one step: activations up, gradients down, and the bytes of both; None if unknown."""

    num_activations: int
    num_gradients: int
    num_bytes: float | None

    @property
    def num(self) -> int:
        """How many there are."""
        return self.num_activations + self.num_gradients


def count_transfers(schedule: Schedule, flow: Flow, costs: Costs) -> Transfers:
    """Return the transfers that `lower` would write; handing over within a rank is none.

    The bytes are known where `costs` give any.

    >>> from evenflow.schedules.gpipe import gpipe
    >>> schedule = gpipe(num_ranks=3, stages_per_rank=1, num_microbatches=4)
    >>> count_transfers(schedule, Flow.chain(3), Costs.uniform(3))
    Transfers(num_activations=8, num_gradients=8, num_bytes=None)
    """
    num_activations = num_gradients = 0
    num_bytes = 0.0
    kinds = (Forward, InputGrad) if schedule.trains else (Forward,)
    for stage in range(schedule.placement.num_stages):
        for kind in kinds:
            # All microbatches are alike: the first stands for each.
            for result in dependencies(kind(stage, 0), flow):
                if len(carriers(result, stage, schedule.placement)) < 2:
                    continue  # it stays on its rank
                if isinstance(result, Forward):
                    num_activations += schedule.num_microbatches
                else:
                    num_gradients += schedule.num_microbatches
                num_bytes += costs.sent_bytes.get((result.stage, stage), 0.0) * schedule.num_microbatches
    return Transfers(num_activations, num_gradients, num_bytes if costs.sent_bytes else None)
