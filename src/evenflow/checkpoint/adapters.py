"""PEFT's adapters: a model wrapped by `peft.get_peft_model`, whose base layers carry other names.

peft is imported only where a model is already wrapped by it, and asked for the names that it saves.
"""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from evenflow.checkpoint.files import read_json
from evenflow.errors import ConfigError
from evenflow.foreign import shown

CONFIG = "adapter_config.json"
WEIGHTS, INDEX = "adapter_model.safetensors", "adapter_model.safetensors.index.json"


def is_adapted(model: torch.nn.Module) -> bool:
    """Whether a model was wrapped by `peft.get_peft_model`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def refuse_injected(model: torch.nn.Module) -> None:
    """Refuse adapters put into a model without a wrapper: its names are neither its own nor peft's."""
    if "peft" not in sys.modules or is_adapted(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ConfigError(
                f"the model's module {path} carries an adapter (add_adapter?), and the model is not wrapped; "
                "use model = peft.get_peft_model(model, config)"
            )


def base_model(model: Any) -> torch.nn.Module:  # peft's classes are not typed
    """The model inside, whose layers the adapters have wrapped."""
    inside: torch.nn.Module = model.get_base_model()
    return inside


def base_names(model: Any, names: Collection[str]) -> dict[str, str]:
    """The names that the unwrapped model has for those of the wrapped one; adapters have none.

    >>> base_names(..., ["base_model.model.fc.base_layer.weight"])  # doctest: +SKIP
    {'base_model.model.fc.base_layer.weight': 'fc.weight'}
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = base_model(model)
    prefix = next(path for path, module in model.named_modules() if module is inside) + "."
    own = tuple(
        f"{path}.{attribute}."
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in module.adapter_layer_names
    )
    found: dict[str, str] = {}
    for name in names:
        if name.startswith(prefix) and not f"{name}.".startswith(own):  # an adapter may be a bare parameter
            found[name] = _unwrapped(name.removeprefix(prefix))
    return found


def _unwrapped(name: str) -> str:
    """A name without the steps that peft's wrappers add."""
    steps = iter(name.split("."))
    kept = []
    for step in steps:
        if step == "modules_to_save":  # a copy that is trained whole; the adapter's name follows
            next(steps)
        elif step not in ("base_layer", "original_module"):
            kept.append(step)
    return ".".join(kept)


def saved_names(model: Any, names: Collection[str]) -> dict[str, str]:
    """What peft saves of these names: those of the adapter, each with its name in the file."""
    from peft import get_peft_model_state_dict

    name_of = {name: torch.empty(0, device="meta") for name in names}
    saved = get_peft_model_state_dict(
        model, state_dict=name_of, adapter_name=only_adapter(model), save_embedding_layers=False
    )
    original = {id(tensor): name for name, tensor in name_of.items()}
    return {original[id(tensor)]: key for key, tensor in saved.items()}


def only_adapter(model: Any) -> str:
    """The name of the model's adapter; raises `ConfigError` where it has several."""
    names = list(model.peft_config)
    if len(names) > 1:
        raise ConfigError(
            f"the model has several adapters ({', '.join(names)}), and load= and export know one: "
            "delete_adapter the others"
        )
    return str(names[0])


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter, which names its base, and no model."""
    return (folder / CONFIG).is_file()


def base_folder(folder: Path) -> Path:
    """The folder that an adapter names as its base model's; raises `ConfigError` if there is none."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if base and isinstance(base, str) and Path(base).is_dir():
        return Path(base)
    raise ConfigError(
        f"load={str(folder)!r} holds an adapter to the base model {shown(base)}, which is no folder here: "
        f"write the path of the base model's folder to base_model_name_or_path in {folder / CONFIG}"
    )


def save_adapter(model: Any, tensors: dict[str, torch.Tensor], folder: Path, *, base: Path | None) -> None:
    """Write an adapter's folder with peft's own means; `base` is where its base model's weights came from."""
    config = model.peft_config[only_adapter(model)]
    named = config.base_model_name_or_path
    try:
        if not named and base is not None:
            config.base_model_name_or_path = str(base.resolve())
        model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = named
