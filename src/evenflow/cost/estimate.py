"""A recorded program's costs on devices that one does not have, from its operations and its bytes.

A function takes as long as its matrix products at the rate that the device reaches, or as its memory traffic,
whichever is longer (the roofline of Williams, Waterman and Patterson, 2009), and a kernel's launch. Nothing
is run. What it cannot know: how well a kernel suits its sizes, and what modules do that ran as one opaque
step. One measured point (`cluster.device.calibrated`) mends the first on average.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from evenflow.cluster.device import Device
from evenflow.cost.experts import Experts
from evenflow.cost.functions import FunctionCost, FunctionCosts, Pass
from evenflow.cost.outline import Places, chain_with, given_to_regions, handed_over, held
from evenflow.graph.nouns.graph import Graph, Node
from evenflow.graph.recording.module_calls import RUN_FOR_REAL
from evenflow.plan.chain import Chain, Held, Seconds

# No kernel reads and writes at the memory's full rate: assumed.
_TRAFFIC_SHARE = 0.85


def estimate(
    graph: Graph,
    model: torch.nn.Module,
    devices: Iterable[Device],
    *,
    num_rows: int,
    dtype: str | None = None,
) -> Chain:
    """Return what each node of a recorded program costs on each kind of device, for one microbatch.

    The model must be recorded on a microbatch of `num_rows` rows, in the dtypes in which it will run:
    sizes are as recorded. `dtype` names the rate of matrix products; by default it is that of each one's
    result. Weight gradients are put off where the runtime does it (`runtime.program.weight_grads`). Raises
    `ConfigError` for a device without a rate for a dtype.
    """
    functions = FunctionCosts(graph)
    # Glue is asked for too: what it makes may be kept. Each stage computes it again, which costs little.
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    costs = {
        node.index: [
            functions.of(
                step, unseen_weights=step.name == RUN_FOR_REAL and not trained.isdisjoint(node.parameters)
            )
            for step in node.steps
        ]
        for node in graph.nodes
    }
    of_chain = [costs[node.index] for node in graph.chain]
    handed, places = handed_over(graph, functions.bytes_of)
    kinds = {device.name: device for device in devices}
    chain = chain_with(
        graph,
        model,
        num_rows=num_rows,
        seconds={name: _seconds(graph.chain, of_chain, device, dtype) for name, device in kinds.items()},
        saved=_held(graph, of_chain, functions, places, lambda cost: (cost.saved, cost.saved_bytes)),
        kept=_held(graph, of_chain, functions, places, lambda cost: (cost.kept, cost.kept_bytes)),
        handed=handed,
        forward_transient_bytes=tuple(
            max((cost.forward_bytes for cost in node), default=0.0) for node in of_chain
        ),
        backward_transient_bytes=tuple(
            max((cost.backward_bytes for cost in node), default=0.0) for node in of_chain
        ),
    )
    experts = Experts(graph)
    parameters = (replace(each, is_expert=each.name in experts.parameters) for each in chain.parameters)
    return replace(chain, parameters=tuple(parameters), expert_bytes=experts.handed_bytes)


def _seconds(
    nodes: Iterable[Node], costs: Iterable[list[FunctionCost]], device: Device, dtype: str | None
) -> Seconds:
    def total(works: Iterable[Pass]) -> float:
        return sum(_work_seconds(work, device, dtype) for work in works)

    forward, input_grad, weight_grad = [], [], []
    for node, of_node in zip(nodes, costs, strict=True):
        forward.append(total(cost.forward for cost in of_node))
        # A checkpoint's forward runs again in the backward.
        again = forward[-1] if node.region is not None else 0.0
        input_grad.append(again + total(cost.input_grad for cost in of_node))
        weight_grad.append(total(cost.weight_grad for cost in of_node))
    return Seconds(tuple(forward), tuple(input_grad), tuple(weight_grad))


def _work_seconds(work: Pass, device: Device, dtype: str | None) -> float:
    products = 0.0
    if work.flops:
        products = work.flops / (device.peak(dtype or work.dtype) * device.efficiency)
    traffic = work.num_bytes / (device.memory_bytes_per_second * _TRAFFIC_SHARE)
    return max(products, traffic) + work.num_kernels * device.kernel_seconds


def _held(
    graph: Graph,
    costs: Iterable[list[FunctionCost]],
    functions: FunctionCosts,
    places: Places,
    what: Callable[[FunctionCost], tuple[frozenset[int], float]],
) -> tuple[Held, ...]:
    """What functions keep: each storage once, under all the nodes that keep it."""
    keepers: defaultdict[int, set[int]] = defaultdict(set)
    alone = [0.0] * len(graph.chain)
    for place, value in given_to_regions(graph):
        if value in graph.maker:
            keepers[graph.values[value].storage].add(place)
    for place, (node, of_node) in enumerate(zip(graph.chain, costs, strict=True)):
        for storages, num_bytes in map(what, of_node) if node.region is None else ():
            alone[place] += num_bytes
            for storage in storages:
                keepers[storage].add(place)
    return held(keepers, alone, functions.bytes_of, places)
