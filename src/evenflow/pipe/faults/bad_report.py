"""Bad numbers in words: which step, where they began, and what helps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from evenflow.graph.nouns.tree import BatchLeaf, BufferSource, CallSource, ParameterSource, Source
from evenflow.pipe.faults.first_bad import BadSum, FromCall, FromGradient, FromLeaf, GraphOf, Origin
from evenflow.runtime.stages.finite import Count
from evenflow.runtime.stages.nan_watch import Place

_SLOPE = (
    "Its slope is infinite there, as that of a root or a norm is at 0: add a small number inside, or keep "
    "such inputs away from it (torch.where around its result does not)"
)
_FORWARD = (
    "Look at what it is given: a logarithm or a root of what is not positive, a division by 0, a row that a "
    "mask hides altogether"
)
_LARGE = "What came to it had grown too large: lower the learning rate, warm it up, or give clip_norm="
_LARGEST = 1e15  # a training that goes well stays far below


@dataclass(frozen=True, slots=True)
class BadStep:
    """What is known of a step whose numbers are bad.

    `loss` and `norm` are the step's (None where no norm was taken), `num_batches` those whose gradients are
    in the norm; `watched`: whether the step was watched as it ran, and not again.
    """

    step: int
    loss: float
    norm: float | None
    num_batches: int
    watched: bool

    def told(self, origin: Origin | None, graph_of: GraphOf, leaves: Sequence[str]) -> str:
        """The whole message; `leaves` are the names of the batch's tensors, as far as somebody knows them."""
        return f"step {self.step} has bad numbers: {self._seen()}. {self._found(origin, graph_of, leaves)}"

    def not_found(self, error: Exception) -> str:
        """The message where the run that looks for them fails."""
        return (
            f"step {self.step} has bad numbers: {self._seen()}. Where they began could not be found: "
            f"{type(error).__name__}: {error}"
        )

    def _seen(self) -> str:
        if not math.isfinite(self.loss):
            return f"its loss is {self.loss}"
        if self.norm is not None and not math.isfinite(self.norm):
            return f"its loss is {self.loss:.6g}, but the norm of its gradients is {self.norm}"
        return f"its loss is {self.loss:.6g}, but not all that it was made of is finite"

    def _found(self, origin: Origin | None, graph_of: GraphOf, leaves: Sequence[str]) -> str:
        match origin:
            case FromLeaf(call, source, count):
                what, remedy = self._leaf(source, leaves)
                return (
                    f"They came in with {what}, {count}, which {_named(call.place, graph_of)} is the first "
                    f"to use, in the forward of {_where(call.place)}. {remedy}"
                )
            case FromCall(call, made):
                inside = "" if call.inside is None else f" (inside, {call.inside} was the first)"
                return (
                    f"They began in the forward of {_where(call.place)}: "
                    f"{_named(call.place, graph_of)}{inside} made {made}; {_taken(call.took)}. "
                    f"{_LARGE if call.took.largest > _LARGEST else _FORWARD}"
                )
            case FromGradient(gradient, was_bad):
                target = "" if gradient.parameter is None else f" in the gradient of {gradient.parameter}"
                forward = "Its forward had made bad numbers too, which did not come to the loss. "
                return (
                    f"They began in the backward of {_where(gradient.place)}: "
                    f"{_named(gradient.place, graph_of)} ({gradient.function}) made {gradient.made}"
                    f"{target}; the gradient that came to it was finite, {gradient.came.largest:.3g} at most "
                    f"in size. {forward * was_bad}{_LARGE if gradient.came.largest > _LARGEST else _SLOPE}"
                )
            case BadSum():
                return self._sum(origin)
            case None:
                return self._nothing()
            case _:
                assert_never(origin)

    def _leaf(self, source: Source, leaves: Sequence[str]) -> tuple[str, str]:
        match source:
            case ParameterSource(name):
                return f"the parameter {name}", (
                    "It came into the step so: an earlier update, or what was loaded, made it bad. Go back "
                    "to a checkpoint from before"
                )
            case BufferSource(name):
                return f"the buffer {name}", "It came into the step so: go back to a checkpoint from before"
            case BatchLeaf(index):
                name = leaves[index] if index < len(leaves) else f"number {index}"
                return f"the batch's tensor {name}", "Leave such rows out where batches are made"
            case CallSource():
                raise AssertionError("no leaf: a node made it")
            case _:
                assert_never(source)

    def _sum(self, found: BadSum) -> str:
        before = self.num_batches - 1
        if before and found.count.num_bad and not self.watched:
            others = f"one of the {before} batches" if before > 1 else "the batch"
            return (
                f"This batch, run again, made none: the gradient of {found.parameter} has {found.count} from "
                f"{others} accumulated before it (update=False), and what made them is not known any more. "
                "find_nan=True says it as it happens"
            )
        if found.count.num_bad:
            return (
                f"No node made one: the gradient of {found.parameter} has {found.count} because it is a "
                "sum of finite ones that are too large. Lower the learning rate, or the loss"
            )
        return (
            f"All gradients are finite, and their norm is too large for float32: that of {found.parameter} "
            f"is the largest, {found.count.largest:.3g}. Lower the learning rate, or the loss"
        )

    def _nothing(self) -> str:
        if self.watched:
            return "No node made one: only the sum over microbatches is too large"
        return (
            "Run again from the same state, no node made one: what made it does not repeat (a kernel that "
            "adds in no fixed order, a counter in the model, a faulty device). find_nan=True names the node "
            "as it runs"
        )


def _taken(took: Count) -> str:
    """What a node was given that made bad numbers in its forward."""
    if took.num_nan:
        return f"of what it was given were {took}"
    if took.num_inf:
        return f"its inputs held no nan, but {took.num_inf} infinities"
    # Where it changed them in place, their size is not known any more.
    return "its inputs were finite" + (f", {took.largest:.3g} at most in size" if took.num else "")


def _where(place: Place) -> str:
    return f"microbatch {place.microbatch} on stage {place.stage} (rank {place.rank})"


def _named(place: Place, graph_of: GraphOf) -> str:
    return next(node.name for node in graph_of(place.microbatch).nodes if node.index == place.node)
