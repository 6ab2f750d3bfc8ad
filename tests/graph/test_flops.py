"""Floating point operations of kernels."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from evenflow.graph.flops import flops_of


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, result)
        return result


def attention(heads):
    query, (key, value) = torch.ones(2, 4, 8, 16), (torch.ones(2, heads, 8, 16) for _ in range(2))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads < 4)


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention_counts_all_heads_of_queries(heads):
    with Counted() as counted:
        attention(heads)
    assert counted.flops == 2 * (2 * 4) * (8 * 8) * (16 + 16)


def test_other_kernels_count_as_torch_says():
    x, weight, image = torch.ones(3, 4), torch.ones(5, 4), torch.ones(1, 2, 8, 8)

    def run():
        F.conv2d(image, torch.ones(3, 2, 3, 3))
        return F.linear(x, weight).relu() + 1

    with Counted() as counted:
        run()
    with FlopCounterMode(display=False) as theirs:
        run()
    assert counted.flops == theirs.get_total_flops() > 0
