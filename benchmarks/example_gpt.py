"""The GPT of the demonstration, for benchmarks."""

from typing import Any

import torch

from evenflow.demo.gpt import GPT, GPTConfig


def gpt(**sizes: Any) -> torch.nn.Module:
    """A GPT of these sizes (see `GPTConfig`), without dropout, always with the same numbers."""
    torch.manual_seed(0)
    return GPT(GPTConfig(dropout=0.0, **sizes)).train()
