"""Weights out: a folder that `from_pretrained` or `load_state_dict` reads; each rank writes what it owns."""

import fnmatch
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from evenflow.checkpoint import adapters, huggingface
from evenflow.checkpoint.files import INDEX, WEIGHTS
from evenflow.checkpoint.whole import appearing, in_the_way
from evenflow.errors import ConfigError
from evenflow.runtime.ranks.world import World

# What prepares a Hugging Face model's input, and is copied from the folder that the weights came from.
PREPARING = (
    "tokenizer*",
    "*.tiktoken",
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "*preprocessor_config.json",
    "processor_config.json",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "vocab*",
)
# What an export consists of.
OF_A_MODEL = ("model*.safetensors", INDEX, "config.json", "generation_config.json", *PREPARING)
OF_AN_ADAPTER = (adapters.WEIGHTS, adapters.CONFIG, "README.md")


def check_replaceable(folder: Path, world: World, kinds: Collection[str]) -> None:
    """Refuse, on every rank, to put an export in the place of anything but another such one; collective."""
    other = "what this export does not write"
    problem = world.share(in_the_way(folder.resolve(), kinds, other) if world.rank == 0 else None, 0)
    if problem is not None:
        raise ConfigError(f"export({str(folder)!r}): {problem}; name another folder")


def export_model(
    folder: Path,
    world: World,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    loaded: Path | None,
) -> None:
    """Write a model's weights, configuration and what prepares its input; collective.

    `tensors` are the model's parameters and persistent buffers that this rank owns; `loaded` is the folder
    that the weights came from, if any.

    Raises:
        ConfigError: The folder is there and no export; or what transformers stores as one tensor lies on
            several ranks.
    """
    adapters.refuse_injected(model)
    check_replaceable(folder, world, OF_A_MODEL)
    written = _as_files_name_them(model, tensors, world)
    held: list[dict[str, int]] = world.gather({name: tensor.nbytes for name, tensor in written.items()})
    files = _file_names([bool(names) for names in held])
    with appearing(folder, world) as partial:
        if written:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in written.items()}
            save_file(contiguous, partial / files[world.rank], metadata={"format": "pt"})
        if world.rank == 0:
            if files != dict.fromkeys(files, WEIGHTS):
                _write_index(partial / INDEX, held, files)
            if huggingface.is_pretrained(model):
                huggingface.save_configs(model, partial)
                _copy_preparing(loaded, partial)


def export_adapter(
    folder: Path,
    world: World,
    model: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    loaded: Path | None,
    device: torch.device,
) -> None:
    """Write the adapter of a model that peft has wrapped, in the one file that peft reads; collective.

    Arguments and errors are those of `export_model`; `device` carries tensors to the first rank.
    """
    name = adapters.only_adapter(model)  # peft gives those of other names than "default" a folder inside
    check_replaceable(folder, world, (*OF_AN_ADAPTER, f"{name}/"))
    saved = adapters.saved_names(model, list(model.state_dict()))
    mine = {name: tensor.detach() for name, tensor in tensors.items() if name in saved}
    gathered = _on_first_rank(mine, world, device)
    base = loaded
    if loaded is not None and adapters.is_adapter_folder(loaded):
        base = adapters.base_folder(loaded)
    with appearing(folder, world, all_write=False) as partial:
        if world.rank == 0:
            adapters.save_adapter(model, gathered, partial, base=base)


def _on_first_rank(
    tensors: Mapping[str, torch.Tensor], world: World, device: torch.device
) -> dict[str, torch.Tensor]:
    """All ranks' tensors, on the first; collective."""
    held: list[list[tuple[str, torch.Size, torch.dtype]]] = world.gather(
        [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    )
    found = {name: tensor.cpu() for name, tensor in tensors.items()}
    for rank, described in enumerate(held[1:], 1):
        for name, shape, dtype in described:
            if world.rank == rank:
                world.send(tensors[name], 0)
            elif world.rank == 0:
                like = torch.empty(shape, dtype=dtype, device=device)
                found[name] = world.receive(like, rank).cpu()
    return found


def _file_names(writes: list[bool]) -> dict[int, str]:
    """The file of each rank that writes one."""
    ranks = [rank for rank, writing in enumerate(writes) if writing]
    if len(ranks) == 1:
        return {ranks[0]: WEIGHTS}
    return {rank: f"model-{at:05}-of-{len(ranks):05}.safetensors" for at, rank in enumerate(ranks, 1)}


def _write_index(path: Path, held: list[dict[str, int]], files: Mapping[int, str]) -> None:
    weight_map = {name: files[rank] for rank, names in enumerate(held) for name in names}
    total = sum(sum(names.values()) for names in held)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _copy_preparing(source: Path | None, target: Path) -> None:
    for path in sorted(source.iterdir()) if source is not None else ():
        if path.is_file() and any(fnmatch.fnmatch(path.name, kind) for kind in PREPARING):
            shutil.copyfile(path, target / path.name)


def _as_files_name_them(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], world: World
) -> dict[str, torch.Tensor]:
    """This rank's tensors as the library stores them.

    Every rank converts its own. Without memory, all are converted together too, which shows whether the parts
    are the whole: a conversion might need parameters that lie on several ranks.
    """
    mine = _each_once(model, tensors)
    if not huggingface.is_pretrained(model):
        return mine
    shapes: list[dict[str, torch.Size]] = world.gather({name: tensor.shape for name, tensor in mine.items()})
    together = huggingface.converted_back(
        model, {n: torch.empty(shape, device="meta") for part in shapes for n, shape in part.items()}
    )
    try:
        written = huggingface.converted_back(model, mine)
        wrong = {n for n, t in written.items() if n not in together or together[n].shape != t.shape}
    except Exception as error:  # noqa: BLE001 (whatever a conversion says of parts that it misses)
        written, wrong = {}, {f"{type(error).__name__}: {error}"}
    told: list[tuple[list[str], list[str]]] = world.gather((sorted(wrong), sorted(written)))
    faults = {name for names, _ in told for name in names}
    made = Counter(name for _, names in told for name in names)
    faults |= set(together) ^ set(made) | {name for name, count in made.items() if count > 1}
    if faults:
        raise ConfigError(
            f"export: transformers stores {type(model).__name__} in tensors that it makes of several "
            f"parameters, and those lie on several ranks ({', '.join(sorted(faults))}); cut between "
            "whole layers (split=)"
        )
    return written


def _each_once(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the one name that each is stored by; a tied parameter has several."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        known = names[id(tensor)] or [name]
        kept = huggingface.stored_name(model, known) if huggingface.is_pretrained(model) else known[0]
        if kept is not None:
            stored[kept] = tensor
    return stored
