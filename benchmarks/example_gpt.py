"""The GPT of examples/gpt.py, which is no package, for benchmarks."""

import importlib.util
from pathlib import Path
from typing import Any

import torch


def gpt(**sizes: Any) -> torch.nn.Module:
    """A GPT of these sizes (see the example's `GPTConfig`), without dropout, always with the same numbers."""
    path = Path(__file__).parents[1] / "examples" / "gpt.py"
    spec = importlib.util.spec_from_file_location("examples_gpt", path)
    assert spec is not None, "the file is there"
    assert spec.loader is not None, "the file is there"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model: torch.nn.Module = module.GPT(module.GPTConfig(dropout=0.0, **sizes))
    return model.train()
