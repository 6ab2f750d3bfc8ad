"""Reading a checkpoint: first what it says, all of it checked, then the tensors that somebody asks for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evenflow.checkpoint.manifest import STATE, TABLE, Manifest, read_json, read_manifest
from evenflow.checkpoint.plain import keys_in
from evenflow.checkpoint.save import no_dist_unsaid
from evenflow.checkpoint.table import DTYPES, Chunk, Saved, from_json
from evenflow.checkpoint.unfit import listed, misshapen
from evenflow.errors import ConfigError
from evenflow.foreign import shown


@dataclass(frozen=True, slots=True, eq=False)  # documents are large
class Checkpoint:
    """A checkpoint whose files are there, of their sizes, and whose JSON is as it was written.

    `table`: its tensors by key. `document`: the rest of its state, in which they are named (see `plain`).
    """

    folder: Path
    manifest: Manifest
    table: Mapping[str, Saved]
    document: Mapping[str, Any]

    def read(self, into: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors, or a rank's parts of them, by their keys: each of its saved shape.

        Raises `ConfigError` for what is damaged, or missing.
        """
        from torch.distributed.checkpoint.api import CheckpointException  # as in `save`
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import load

        from evenflow.checkpoint.storage import Reader

        for key, tensor in into.items():
            saved = self.table.get(key)
            if saved is None or saved.shape != tuple(tensor.shape):
                raise ConfigError(f"{self.folder}: {key} is missing, or of another shape")
        try:
            with no_dist_unsaid():
                load(
                    dict(into),
                    storage_reader=Reader(self.folder, self.table),
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,  # each rank reads what it wants
                )
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if isinstance(first, ConfigError):
                raise ConfigError(f"{self.folder}: {first}") from first
            raise

    def tensors(self, keys: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Some of the tensors whole, by default all, on the host. Raises `ConfigError` as `read` does."""
        wanted = list(self.table) if keys is None else keys
        found = {
            key: torch.empty(self.table[key].shape, dtype=DTYPES[self.table[key].dtype]) for key in wanted
        }
        self.read(found)
        return found


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read all of a checkpoint but its tensors.

    Raises:
        ConfigError: It is no checkpoint, or one of another version; a file is missing, cut short or damaged
            (of a file of tensors the header), with its name.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        problem = file.problem(folder)
        if problem is not None:
            raise ConfigError(f"the checkpoint {folder} is broken: {problem}")
    names = {file.name for file in manifest.files}
    for name in (STATE, TABLE):
        if name not in names:
            raise ConfigError(f"{folder}: its manifest does not name {name}")
    try:
        table = from_json(read_json(folder / TABLE))
    except ConfigError as error:
        raise ConfigError(f"{folder / TABLE}: {error}") from error
    _check_sizes(folder, manifest, table)
    document = read_json(folder / STATE)
    if not isinstance(document, dict):
        raise ConfigError(f"{folder / STATE} is no state: it must be an object of JSON")
    unknown = sorted(keys_in(document) - set(table))
    if unknown:
        raise ConfigError(f"{folder / STATE} speaks of tensors that the table does not have: {unknown[:3]}")
    return Checkpoint(folder, manifest, table, document)


def _check_sizes(folder: Path, manifest: Manifest, table: Mapping[str, Saved]) -> None:
    """Refuse tensors that lie elsewhere, or are larger than what is there: before anything is allocated."""
    left = {file.name: file.num_bytes - file.checked_bytes for file in manifest.files}
    for saved in table.values():
        for chunk in saved.chunks:
            if chunk.file not in left:
                raise ConfigError(
                    f"{folder / TABLE}: {saved.name} lies in {shown(chunk.file)}, which is no file of it"
                )
            left[chunk.file] -= math.prod(chunk.shape) * DTYPES[saved.dtype].itemsize
    for name, size in left.items():
        if size:
            raise ConfigError(f"{folder / TABLE}: {name} is not as large as what lies in it")


def misfit(checkpoint: Checkpoint, model: torch.nn.Module, own: Mapping[str, torch.Tensor]) -> str | None:
    """Why a checkpoint does not fit a model, with every name, if so; `own`: what it must have."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= set(model.state_dict(keep_vars=True))
    held = checkpoint.document.get("model")
    if not isinstance(held, dict):
        return "its state holds no model"
    shapes = {name: checkpoint.table[key].shape for name in held for key in keys_in(held[name])}
    other_shapes = {
        misshapen(name, shapes[name], parameter.shape)
        for name, parameter in own.items()
        if name in shapes and shapes[name] != tuple(parameter.shape)
    }
    faults = listed(
        {
            "missing from it": set(own) - set(shapes),
            "unexpected in it": set(shapes) - names,
            "of another shape": other_shapes,
        }
    )
    kinds = f"it is of a {checkpoint.manifest.model}, and the model is a {type(model).__name__}"
    return f"{kinds}; {faults}" if faults else None


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those buffers of a model that its `state_dict` has."""
    kept = set(model.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def problems(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a checkpoint's tensors: each is read, and compared with its checksum."""
    from evenflow.checkpoint.storage import opened, read_chunk

    by_file: dict[str, list[tuple[Saved, Chunk]]] = {}
    for saved in checkpoint.table.values():
        for chunk in saved.chunks:
            by_file.setdefault(chunk.file, []).append((saved, chunk))
    found = []
    for name, each in sorted(by_file.items()):
        try:
            with opened(checkpoint.folder / name) as file:
                for saved, chunk in each:
                    try:
                        read_chunk(file, saved, chunk)
                    except ConfigError as error:
                        found.append(str(error))
        except ConfigError as error:
            found.append(str(error))
    return found
