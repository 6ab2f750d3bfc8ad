"""What data ranks do together, as `pipeline` asks: they sum gradients, and may share what they hold."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from evenflow.runtime.program.kept import buffers_at
from evenflow.runtime.ranks.data_ranks import DataRanks, OneDataRank, Replicated
from evenflow.runtime.ranks.mesh import Mesh
from evenflow.runtime.ranks.sums import Named, tell
from evenflow.runtime.ranks.tensor_ranks import TensorRanks
from evenflow.runtime.recorded.parameters import Accumulators
from evenflow.runtime.recorded.recordings import Recordings
from evenflow.runtime.stages.stage import Stage


class SharedBuffers:
    """Buffers that forwards change: all data ranks go on with the first one's, as torch's replicas do."""

    def __init__(self, mesh: Mesh, recordings: Recordings, stages: Collection[int]) -> None:
        self._data, self._recordings, self._stages = mesh.data, recordings, stages
        self._names: set[str] = set()
        self._num_seen = 0  # of recordings

    def spread(self) -> None:
        """Let all have the first one's; collective."""
        if self._data.size == 1:
            return
        for entry in self._recordings.entries[self._num_seen :]:
            for section in entry.cut.sections:
                if section.stage in self._stages:
                    self._names.update(name for node in section.nodes for name in node.changed_buffers)
        self._num_seen = len(self._recordings.entries)
        buffers = buffers_at(self._recordings.model, sorted(self._names))
        for work in [self._data.broadcast(buffer, 0) for buffer in buffers]:
            work.wait()


@dataclass(frozen=True, slots=True)
class Dealt:
    """What the data ranks do with the parameters of this process's stages.

    `owned` are these, as optimizers and checkpoints see them; `used` those that programs use in the place of
    some, by name.
    """

    data: DataRanks
    owned: Mapping[int, Mapping[str, torch.nn.Parameter]]
    used: Mapping[str, torch.nn.Parameter] = field(default_factory=dict)


def data_ranks(
    mesh: Mesh,
    stages: Mapping[int, Stage],
    owned: Mapping[int, Mapping[str, torch.nn.Parameter]],
    accumulators: Accumulators,
    shard: str | None,
    tensor: TensorRanks,
) -> Dealt:
    """The data ranks of these stages, which have the first one's numbers from now on; collective.

    `owned` are the stages' parameters, which with "fsdp" take their sharded forms.
    """
    named: dict[int, list[Named]] = {stage: list(held.items()) for stage, held in owned.items()}
    every = [each for held in named.values() for each in held]
    tensor.begin(every)
    if mesh.data.size == 1:
        return Dealt(OneDataRank(every, tensor.settled), owned)
    tell(mesh.data, every, lambda _: 0)
    shared = accumulators.uses.keys()
    if shard != "fsdp":
        states = shard == "zero1"
        late = shared.__contains__
        data = Replicated(mesh.data, named, shares_states=states, late=late, settled=tensor.settled)
        return Dealt(data, owned)
    from evenflow.runtime.ranks.fully_sharded import FullySharded, ShardedStage

    mesh.check_carried(next(iter(stages.values())).device, 'shard="fsdp"')
    assert mesh.devices is not None, "there are data ranks"
    sharded: dict[int, ShardedStage] = {}
    used: dict[str, torch.nn.Parameter] = {}
    parted: dict[int, Mapping[str, torch.nn.Parameter]] = {}
    for number, held in owned.items():
        whole = {held[name] for name in held if name in shared}
        sharded[number] = made = ShardedStage(stages[number], mesh.devices["dp"], whole, mesh.data)
        used |= {key.replace("/", "."): parameter for key, parameter in made.gathered.items()}
        parted[number] = {**held, **{key.replace("/", "."): each for key, each in made.sharded.items()}}
    kept = {stage: [each for each in each_named if each[0] in shared] for stage, each_named in named.items()}
    whole_ones = Replicated(mesh.data, kept, shares_states=False, late=lambda _: True, settled=tensor.settled)
    return Dealt(FullySharded(mesh.data, sharded, whole_ones), parted, used)
