"""What `evenflow checkpoint` does: list, verify, export, import."""

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evenflow.checkpoint import adapters
from evenflow.checkpoint.load import (
    Checkpoint,
    misfit,
    open_checkpoint,
    persistent_buffers,
    problems,
)
from evenflow.checkpoint.manifest import checkpoints_in, is_checkpoint, read_manifest
from evenflow.checkpoint.plain import encode
from evenflow.checkpoint.save import Content, write_checkpoint
from evenflow.checkpoint.weights_in import find_weights
from evenflow.checkpoint.weights_out import export_adapter, export_model
from evenflow.cli.config import FolderModel, FunctionModel, ModelChoice
from evenflow.cli.config_file import read_config
from evenflow.cli.printing import print_line, print_whole
from evenflow.cli.source import build
from evenflow.errors import ConfigError
from evenflow.journal.folder import CHECKPOINT, CHECKPOINTS, CONFIG
from evenflow.runtime.ranks.world import SingleProcess
from evenflow.view.units import format_bytes


def ls(folder: Path) -> None:
    """Print the checkpoints of a run's folder, or of one that holds checkpoints.

    Raises:
        ConfigError: There are none.
    """
    table = Table()
    for heading in ("checkpoint", "step", "updates", "size", "model", "saved at", "layout"):
        table.add_column(heading, justify="right" if heading in ("step", "updates", "size") else "left")
    found = _found(folder)
    if not found:
        raise ConfigError(f"{folder} holds no checkpoints: name a run's folder, or one of checkpoints")
    for each in found:
        try:
            manifest = read_manifest(each)
        except ConfigError as error:
            table.add_row(Text(each.name), "", "", "", Text(str(error), style="red"), "", "")
            continue
        numbers = (f"{manifest.step:,}", f"{manifest.num_updates:,}", format_bytes(manifest.num_bytes))
        words = (manifest.model, manifest.saved_at, manifest.layout)
        table.add_row(Text(str(each.relative_to(folder))), *numbers, *map(Text, words))
    print_whole(Console(), table)


def verify(place: Path) -> bool:
    """Read every byte; print what is wrong. Returns whether nothing is."""
    console = Console()
    try:
        checkpoint = open_checkpoint(_newest(place))
        faults = problems(checkpoint)
    except ConfigError as error:
        faults = [str(error)]
    else:
        size, number = format_bytes(checkpoint.manifest.num_bytes), len(checkpoint.table)
        if not faults:
            print_line(console, f"{checkpoint.folder}: {number} tensors, {size}: whole", "green")
    for fault in faults:
        print_line(console, fault, "red")
    return not faults


def export(place: Path, folder: Path, source: str | None, model_folder: Path | None) -> None:
    """Write the weights of a checkpoint to a folder that others load.

    Raises:
        ConfigError: It is no checkpoint, is damaged, or is of another model; the folder holds something.
    """
    checkpoint = open_checkpoint(_newest(place))
    choice = _choice(source, model_folder, checkpoint.folder)
    model = build(choice, seed=0, loads=False).model
    owned = _fill(model, checkpoint)
    loaded = choice.folder if isinstance(choice, FolderModel) else None
    if adapters.is_adapted(model):
        export_adapter(folder, SingleProcess(), model, owned, loaded=loaded, device=torch.device("cpu"))
    else:
        export_model(folder, SingleProcess(), model, owned, loaded=loaded)
    print_line(Console(), f"wrote {folder}, of step {checkpoint.manifest.step}")


def import_weights(weights: Path, folder: Path, source: str | None, model_folder: Path | None) -> None:
    """Make a checkpoint of a folder's weights, as a run would have at its beginning.

    Raises:
        ConfigError: The folder's weights are not the model's; there is something at `folder`.
    """
    if folder.exists():
        raise ConfigError(f"{folder} is there already: name a new folder")
    model = build(_choice(source, model_folder, folder), seed=0, loads=False).model
    first = _first_names(model)
    found = find_weights(model, weights, first)
    tensors: dict[str, torch.Tensor] = {}
    state = {"model": {first.get(name, name): each for name, each in found.read(_held(model))}}
    state |= {key: {} for key in ("masters", "loss_scale", "optimizer", "settings", "optimizers")}
    document = encode(state | {"schedulers": {}, "processes": {}}, "", tensors)
    numbers = {"step": 0, "num_updates": 0, "seed": 0, "extra": None}
    content = Content(
        tensors=tensors,
        numbers=tensors,
        document=document | numbers,
        step=0,
        num_updates=0,
        model=type(model).__name__,
        layout=f"imported from {weights.name}",
        plan=None,
    )
    write_checkpoint(folder, SingleProcess(), content)
    print_line(Console(), f"wrote {folder}, {len(tensors)} tensors")


def _found(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, those of a run, or itself."""
    last = [folder / CHECKPOINT] if is_checkpoint(folder / CHECKPOINT) else []
    own = [folder] if is_checkpoint(folder) else []
    found = [*checkpoints_in(folder / CHECKPOINTS), *last]
    return own or sorted(found, key=_num_updates) or checkpoints_in(folder)


def _num_updates(folder: Path) -> int:
    """Of a checkpoint; one whose manifest is broken counts as the oldest."""
    try:
        return read_manifest(folder).num_updates
    except ConfigError:
        return -1


def _newest(place: Path) -> Path:
    return next(reversed(_found(place)), place)


def _choice(source: str | None, folder: Path | None, checkpoint: Path) -> ModelChoice:
    """The model that was named, or that of the run in whose folder the checkpoint lies."""
    match source, folder:
        case None, Path():
            return FolderModel(folder)
        case str(), None if source.endswith(".toml"):
            return read_config(Path(source)).model
        case str(), None:
            return FunctionModel(source)
        case None, None:
            for place in checkpoint.resolve().parents:
                if (place / CONFIG).is_file():
                    return read_config(place / CONFIG).model
    raise ConfigError(
        "of which model is it? name it once: a CONFIG.toml, MODULE:FUNCTION or --model FOLDER, unless the "
        "checkpoint lies in its run's folder"
    )


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of a parameter with the first one of the same."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers of a model, by name."""
    return {**dict(model.named_parameters()), **persistent_buffers(model)}


def _fill(model: torch.nn.Module, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """Give a model the checkpoint's numbers; what it then holds, by name."""
    own = _held(model)
    problem = misfit(checkpoint, model, own)
    if problem is not None:
        raise ConfigError(f"{checkpoint.folder}: {problem}")
    keys = {f"model.{name}": name for name in own}
    with torch.no_grad():
        for key, tensor in checkpoint.tensors(list(keys)).items():
            own[keys[key]].copy_(tensor)
    return own
