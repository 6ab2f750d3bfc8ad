"""Floating point operations of kernels."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from evenflow.graph.kernels.flops import flops_of


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


@pytest.mark.parametrize("name", ["_grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback"])
def test_each_row_of_a_grouped_product_meets_one_expert(name):
    rows, experts, offsets = torch.ones(16, 8), torch.ones(4, 8, 32), torch.tensor([2, 6, 6, 16])
    assert flops_of(kernel(name), (rows, experts, offsets), {}, None) == 2 * 16 * 8 * 32


def test_the_other_grouped_products():
    offsets = torch.tensor([2, 6, 6, 16])
    grouped = kernel("_grouped_mm")
    # What the backward of experts multiplies: a stack by columns in groups, and columns by rows in groups.
    assert flops_of(grouped, (torch.ones(4, 8, 32), torch.ones(32, 16), offsets), {}, None) == 2 * 8 * 32 * 16
    assert flops_of(grouped, (torch.ones(8, 16), torch.ones(16, 32), offsets), {}, None) == 2 * 8 * 16 * 32
    assert flops_of(grouped, (torch.ones(4, 8, 16), torch.ones(4, 16, 32)), {}, None) == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize(
    ("name", "shapes", "flops"),
    [
        ("_scaled_mm_v2", ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        ("_int_mm", ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        ("mv", ((3, 5), (5,)), 2 * 3 * 5),
        ("dot", ((5,), (5,)), 2 * 5),
        ("addmv", ((3,), (3, 5), (5,)), 2 * 3 * 5),
        ("addbmm", ((3, 7), (2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        ("_addmm_activation", ((7,), (3, 5), (5, 7)), 2 * 3 * 5 * 7),
    ],
)
def test_products_that_torch_does_not_count(name, shapes, flops):
    args = tuple(map(torch.ones, shapes))
    assert flops_of(kernel(name), args, {}, None) == flops


def kernel(name):
    if name == "grouped_mm_fallback":
        from transformers.integrations import moe  # noqa: F401 (it makes the kernel)

        return torch.ops.transformers.grouped_mm_fallback.default
    return getattr(torch.ops.aten, name).default
