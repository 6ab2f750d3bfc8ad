"""`profile_of`: measure every distinct node of a recorded program on a device, one at a time.

Only one node's parameters and inputs are in memory at once, made of small random numbers; the model's own may
have none. So a model can be profiled on a device that it is too large for.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from evenflow.cost.assemble import chain_of
from evenflow.cost.bench import Benches, Role, places_of_parameters, undisturbed
from evenflow.cost.cache import Cache, Place
from evenflow.cost.inputs import Inputs
from evenflow.cost.measure import measure
from evenflow.cost.measured import Measured
from evenflow.cost.recorded import Recorded
from evenflow.cost.signature import signature
from evenflow.errors import EvenflowError, RecordError
from evenflow.graph.nouns.graph import Graph, Node
from evenflow.graph.nouns.tree import BatchLeaf, CallSource
from evenflow.plan.chain import Chain
from evenflow.runtime.notes.host_memory import keep_freed_memory

# Is told the name of the node that comes next, how many are done, and how many there are to measure.
Progress = Callable[[str, int, int], None]
BUDGET_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Profile:
    """A chain with measured costs.

    `signs` are the nodes' signatures; `num_measured` nodes were measured now, and not found in the cache.
    `op_seconds` is what a forward or a backward takes beside its nodes. `measured` holds the name of a node
    and its costs, by signature.
    """

    chain: Chain
    signs: tuple[str, ...]
    num_measured: int
    op_seconds: float
    measured: Mapping[str, tuple[str, Measured]]

    @property
    def alike(self) -> tuple[int, ...]:
        """For each node the first one that was measured for it too, as places in the chain."""
        first = {sign: at for at, sign in reversed([*enumerate(self.signs)])}
        return tuple(first[sign] for sign in self.signs)


def profile_of(
    recorded: Recorded,
    *,
    cache: Path | None = None,
    budget_seconds: float = BUDGET_SECONDS,
    progress: Progress | None = None,
) -> Profile:
    """Measure the nodes of a recorded program on its device.

    - `cache`: a folder for measurements, which are then found again by what runs, device, version of torch
      and number of threads.
    - `budget_seconds`: how long to repeat each distinct node.

    The model, its buffers and all random generators are left as they were. Raises `RecordError` for a node
    that cannot run by itself.
    """
    graph, place = recorded.graph, Place.of(recorded.device)
    if recorded.device.type == "cpu":
        keep_freed_memory()  # as a run does
    with undisturbed(recorded.model, recorded.device):
        profiler = _Profiler(recorded, Cache(cache, place), budget_seconds)
        profiler.measure_all(progress)
    chain = chain_of(
        graph,
        recorded.model,
        {index: profiler.measured[sign] for index, sign in profiler.signs.items()},
        num_rows=recorded.num_rows,
        kind=place.device,
    )
    signs = tuple(profiler.signs[node.index] for node in graph.chain)
    entry = statistics.median(one.entry_seconds for one in profiler.measured.values())
    named = {
        profiler.signs[n.index]: (n.name, profiler.measured[profiler.signs[n.index]]) for n in graph.nodes
    }
    return Profile(chain, signs, profiler.num_measured, op_seconds=entry / 2, measured=named)


class _Profiler:
    """Measures the nodes of one graph. `signs` are the signatures of nodes, by index."""

    def __init__(self, recorded: Recorded, cache: Cache, budget_seconds: float) -> None:
        graph, model = recorded.graph, recorded.model
        self._graph, self._device, self._cache = graph, recorded.device, cache
        self._budget_seconds = budget_seconds
        self._benches = Benches(graph, model, places_of_parameters(model), recorded.device)
        self._inputs = Inputs(recorded, self._run)
        self._roles = _roles(graph)
        self.signs = {
            node.index: signature(graph, node, model, graded=self._roles[node.index].all_graded)
            for node in graph.nodes
        }
        self.measured: dict[str, Measured] = {}
        self.num_measured = 0

    def measure_all(self, progress: Progress | None) -> None:
        """Measure what is not in the cache."""
        waiting: dict[str, Node] = {}
        for node in self._graph.nodes:
            sign = self.signs[node.index]
            if sign in self.measured or sign in waiting:
                continue
            found = self._cache.find(sign)
            if found is None:
                waiting[sign] = node
            else:
                self.measured[sign] = found
        for done, (sign, node) in enumerate(waiting.items()):
            if progress is not None:
                progress(node.name, done, len(waiting))
            self.measured[sign] = self._measure(node)
            self.num_measured += 1
            self._cache.keep(sign, node.name, self.measured[sign])

    def _measure(self, node: Node) -> Measured:
        try:
            with self._benches.of(node, self._roles[node.index]) as (bench, idle):
                return measure(
                    bench,
                    idle,
                    lambda: self._inputs.of(node),
                    self._device,
                    budget_seconds=self._budget_seconds,
                )
        except (EvenflowError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RecordError(
                f"{node.name} cannot be run by itself to be measured ({type(error).__name__}: {error}): it "
                "needs numbers that only the nodes before it make; keep them in one module (atomic=[…])"
            ) from error

    def _run(self, node: Node, inputs: Mapping[int, torch.Tensor]) -> Mapping[int, torch.Tensor]:
        """Run a node forward for its results."""
        role = dataclasses.replace(self._roles[node.index], used=node.makes)
        with self._benches.of(node, role) as (bench, _), torch.no_grad():
            return bench.results(bench.forward(inputs))


def _roles(graph: Graph) -> dict[int, Role]:
    """What the rest of the program does with each node's values."""
    last: dict[int, int] = {}
    for node in graph.nodes:
        last |= dict.fromkeys(node.inputs, node.index)
    returned = set(graph.output.refs)
    loss = set(graph.output.refs[:1])
    found = {}
    for node in graph.nodes:
        own = [v for v in node.inputs if isinstance(graph.values[v].source, BatchLeaf | CallSource)]
        arriving = [v for v in own if (maker := graph.maker.get(v)) is not None and not maker.glue]
        used = [v for v in node.makes if v in returned or last.get(v, -1) > node.index]
        wants = {v for v in (*own, *node.makes) if graph.values[v].info.requires_grad and not node.glue}
        found[node.index] = Role(
            arriving=tuple(arriving),
            given=tuple(v for v in own if v not in arriving),
            used=tuple(used),
            graded=tuple(v for v in used if v in wants and (v in loss or last.get(v, -1) > node.index)),
            shared=tuple(v for v in arriving if v in wants and last[v] > node.index),
        )
    return found
