"""Saving: a folder that becomes visible only when it is whole, written by all ranks together.

What is written is a snapshot, so that it may be written by another thread while the training goes on.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from evenflow.checkpoint.manifest import PLAN, STATE, TABLE, FileRecord, Manifest, write_manifest
from evenflow.checkpoint.plain import merged
from evenflow.checkpoint.whole import appearing, flush
from evenflow.runtime.ranks.world import World


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no equality
class Content:
    """What a process gives to a checkpoint.

    `tensors` are its tensors by key, as it holds them: parts of tensors say whose. `numbers` are those of its
    parts, on the host, which nobody changes any more. `document` is the rest of its state, as JSON.
    """

    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, torch.Tensor]
    document: Mapping[str, Any]
    step: int
    num_updates: int
    model: str
    layout: str
    plan: str | None  # the text of its file


def write_checkpoint(folder: Path, world: World, content: Content) -> None:
    """Write `folder`; collective. One that is there is replaced once the new one is complete.

    Raises what this rank could not do, `PeerError` for what another could not; nothing appears then.
    """
    # Importing it takes a second, which who never saves need not wait for.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    from evenflow.checkpoint.storage import SnapshotPlanner, Writer, write_json

    with appearing(folder, world) as partial, no_dist_unsaid() if world.size == 1 else nullcontext():
        documents = world.gather(content.document)
        writer = Writer(partial)
        try:
            save(
                dict(content.tensors),
                storage_writer=writer,
                planner=SnapshotPlanner(content.numbers),
                process_group=world.group,
                no_dist=world.size == 1,
            )
        except CheckpointException as error:
            own = error.failures.get(world.rank)
            if own is not None:
                raise own[0] from None
            return  # that of another rank, which tells all
        records = [record for record in world.gather(writer.record) if record is not None]
        if world.is_first:
            write_json(partial / STATE, merged(documents))
            if content.plan is not None:
                (partial / PLAN).write_text(content.plan, encoding="utf-8")
                flush(partial / PLAN)
            own_files = (STATE, TABLE, *([PLAN] if content.plan is not None else []))
            records += [FileRecord.of(partial / name) for name in own_files]
            write_manifest(partial, _manifest(content, tuple(records)))
            flush(partial)


@contextmanager
def no_dist_unsaid() -> Iterator[None]:
    """Let torch not warn that a process works alone, on purpose; filters are the whole process's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _manifest(content: Content, records: tuple[FileRecord, ...]) -> Manifest:
    return Manifest(
        evenflow=metadata.version("evenflow"),
        torch=torch.__version__,
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        step=content.step,
        num_updates=content.num_updates,
        model=content.model,
        layout=content.layout,
        files=records,
    )
