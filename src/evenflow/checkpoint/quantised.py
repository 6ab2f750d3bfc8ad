"""Quantised weights, which are refused by name: their numbers are codes, and would be read as weights."""

from pathlib import Path
from typing import Any

import torch

from evenflow.checkpoint.files import read_json
from evenflow.errors import ConfigError

KINDS = ("Linear4bit", "Linear8bitLt", "Params4bit", "Int8Params")  # of bitsandbytes


def refuse_quantised(model: torch.nn.Module, folder: Path) -> None:
    """Raise `ConfigError` for a model or a folder of 4-bit (or otherwise quantised) weights."""
    for path, module in model.named_modules():
        kinds = [type(module).__name__, *(type(each).__name__ for each in module._parameters.values())]
        for kind in kinds:
            if kind in KINDS:
                raise ConfigError(
                    f"the model's module {path} is quantised by bitsandbytes ({kind}), which load= cannot "
                    "fill; build the model without a quantization_config"
                )
    configured = _method(getattr(getattr(model, "config", None), "quantization_config", None))
    if configured is not None:
        raise ConfigError(
            f"the model's configuration asks for {configured} weights (quantization_config), which load= "
            "cannot make; remove it, and load the folder of the model before it was quantised"
        )
    config = folder / "config.json"
    stored = _method(read_json(config).get("quantization_config")) if config.is_file() else None
    if stored is not None:
        raise ConfigError(
            f"load={str(folder)!r} holds {stored} weights (quantization_config in its config.json), which "
            "load= cannot read; load the folder of the model before it was quantised"
        )


def _method(config: Any) -> str | None:  # a mapping, or one of transformers' classes
    if not config:
        return None
    asked = config if isinstance(config, dict) else config.to_dict()
    bits = next((f"{bits}-bit " for bits in (4, 8) if asked.get(f"load_in_{bits}bit")), "")
    return f"{bits}{getattr(asked.get('quant_method'), 'value', asked.get('quant_method')) or 'quantised'}"
