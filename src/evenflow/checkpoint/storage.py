"""Where torch.distributed.checkpoint keeps tensors here: safetensors, one file a rank, and a table in JSON.

torch's own file storage keeps its table as a pickle, which is code. Which rank writes what, and which chunks
a rank with another layout must read, torch's planners decide.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from evenflow.checkpoint.manifest import TABLE, FileRecord
from evenflow.checkpoint.table import DTYPES, Chunk, Saved, as_json, checksum
from evenflow.checkpoint.whole import flush
from evenflow.errors import ConfigError

# Types that safetensors has; tensors of others are written as bytes, and the table knows their type.
_STORABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
    *(torch.int8, torch.uint8, torch.bool),
}
_HEADER_LENGTH_BYTES = 8  # safetensors: the length of its header, little-endian, and then the header


class SnapshotPlanner(DefaultSavePlanner):
    """Plans with the tensors of a state, and writes what a snapshot of this rank has in their place."""

    def __init__(self, snapshot: Mapping[str, torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._snapshot = snapshot

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The rank's chunk of a tensor: it has one."""
        return self._snapshot[write_item.index.fqn]


class Writer(StorageWriter):
    """Writes a rank's chunks into a file, of which `record` tells; the first rank writes the table of all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.record: FileRecord | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: it writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans, each with the name of its rank's file."""
        return [
            replace(plan, storage_data=f"tensors-{rank:05}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write what the plan has for this rank."""
        future: Future[list[WriteResult]] = Future()
        path, kept, results = self._folder / plan.storage_data, {}, []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor), "plain values are no part of it"
            assert item.tensor_data is not None, "as above"
            offsets, shape = item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes
            assert tensor.shape == shape, f"{item.index.fqn}: the snapshot has the rank's chunk"
            whole = shape == item.tensor_data.size
            key = item.index.fqn if whole else f"{item.index.fqn} at {','.join(map(str, offsets))}"
            host = tensor.detach().cpu().contiguous()
            kept[key] = host if host.dtype in _STORABLE else host.reshape(-1).view(torch.uint8)
            chunk = Chunk(tuple(offsets), tuple(shape), path.name, key, checksum(host))
            results.append(WriteResult(item.index, host.nbytes, chunk))
        if kept:
            save_file(kept, path, metadata={"format": "pt"})
            flush(path)
            with path.open("rb") as file:
                header = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            self.record = FileRecord.of(path, _HEADER_LENGTH_BYTES + header)
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table: on the first rank, when all have written."""
        chunks: defaultdict[str, list[Chunk]] = defaultdict(list)
        for result in (result for each in results for result in each):
            chunks[result.index.fqn].append(result.storage_data)
        described = metadata.state_dict_metadata
        table = [_saved(name, described[name], tuple(each)) for name, each in sorted(chunks.items())]
        write_json(self._folder / TABLE, as_json(table))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Never asked: it is made for its folder."""
        return True


def _saved(name: str, described: Any, chunks: tuple[Chunk, ...]) -> Saved:  # of torch's own types
    dtype = str(described.properties.dtype).removeprefix("torch.")
    return Saved(name, dtype, tuple(described.size), chunks)


class Reader(StorageReader):
    """Reads chunks of a folder whose `table` has been checked, each once and against its checksum."""

    def __init__(self, folder: Path, table: Mapping[str, Saved]) -> None:
        self._folder, self._table = folder, table
        self._chunks = {
            MetadataIndex(name, chunk.offsets): (saved, chunk)
            for name, saved in table.items()
            for chunk in saved.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: it reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table as torch's planners know it."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(DTYPES[saved.dtype]),
                    torch.Size(saved.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape))
                        for chunk in saved.chunks
                    ],
                )
                for name, saved in self._table.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the table is known."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Read what the plan asks for into the planner's tensors."""
        wanted = defaultdict(list)
        for item in plan.items:
            wanted[item.storage_index].append(item)
        by_file = defaultdict(list)
        for index, items in wanted.items():
            by_file[self._chunks[index][1].file].append((index, items))
        for name, each in by_file.items():
            with opened(self._folder / name) as file:
                for index, items in each:
                    tensor = read_chunk(file, *self._chunks[index])
                    for item in items:
                        part = tensor
                        for dim, (at, size) in enumerate(
                            zip(item.storage_offsets, item.lengths, strict=True)
                        ):
                            part = part.narrow(dim, at, size)
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(part)
                        planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Never asked: it is made for its folder."""
        return True


def opened(path: Path) -> Any:  # safetensors' handles have no type
    """A file of tensors, whose header is checked by safetensors; raises `ConfigError`."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def read_chunk(file: Any, saved: Saved, chunk: Chunk) -> torch.Tensor:  # as above
    """A chunk of an open file; raises `ConfigError` where it is not what was written."""
    where = f"{saved.name} in {chunk.file}"
    dtype = DTYPES[saved.dtype]
    plain = dtype in _STORABLE
    size = torch.Size(chunk.shape)
    shape = list(size) if plain else [size.numel() * dtype.itemsize]
    try:
        if file.get_slice(chunk.key).get_shape() != shape:  # before anything is allocated
            raise ConfigError(f"{where} is damaged: it has another shape than the table says")
        tensor: torch.Tensor = file.get_tensor(chunk.key)
    except SafetensorError as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if tensor.dtype != (dtype if plain else torch.uint8):
        raise ConfigError(f"{where} is damaged: it has another type than the table says")
    if checksum(tensor) != chunk.checksum:
        raise ConfigError(f"{where} is damaged: its checksum is another")
    return tensor if plain else tensor.view(dtype).view(size)


def write_json(path: Path, content: Any) -> None:  # whatever JSON holds
    """Write a file of JSON, and see that it is on the disk."""
    path.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    flush(path)
