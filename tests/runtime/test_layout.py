"""Layouts: what `pack` flattens `unpack` lays out again, at the same strides."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenflow.runtime.links.layout import Layout, empty, pack, unpack


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any view of a block of numbers: gaps, repeats, overlaps and size 0 included."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    stride = [draw(st.integers(0, 30)) for _ in shape]
    needed = 1 + sum(max(size - 1, 0) * step for size, step in zip(shape, stride, strict=True))
    offset = draw(st.integers(0, 3))
    return torch.arange(offset + needed, dtype=torch.float32).as_strided(shape, stride, offset)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """What programs make: permuted, sliced and expanded tensors, without overlaps."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    tensor = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for dim in range(tensor.dim()):
        step = draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(draw(st.integers(0, 1)), None, step),)]
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(draw(st.integers(0, tensor.dim())))
        tensor = tensor.expand([draw(st.integers(1, 3)) if size == 1 else size for size in tensor.shape])
    return tensor


def assert_round_trip(tensor: torch.Tensor) -> None:
    layout = Layout.of(tensor)
    block = pack(tensor, layout)
    assert block.shape == empty(layout, tensor.device).shape
    assert block.dtype == empty(layout, tensor.device).dtype
    assert block.is_contiguous()
    # What arrives is another block with the same numbers.
    found = unpack(block.clone(), layout)
    assert torch.equal(found, tensor)
    assert Layout.of(found) == layout


@given(views())
def test_views_come_back_at_their_strides(tensor):
    assert_round_trip(tensor)


@given(tensors())
def test_any_strides_come_back(tensor):
    assert_round_trip(tensor)


@given(views(), st.data())
def test_a_tensor_that_lies_otherwise_arrives_as_the_layout_says(tensor, data):
    """The first parcel of its kind tells how the others are laid out."""
    order = data.draw(st.permutations(range(tensor.dim())))
    inverse = sorted(range(tensor.dim()), key=lambda dim: order[dim])
    other = tensor.permute(order).contiguous().permute(inverse)
    found = unpack(pack(tensor, Layout.of(other)).clone(), Layout.of(other))
    assert torch.equal(found, tensor)
    assert Layout.of(found) == Layout.of(other)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(16.0).view(1, 2, 2, 4).contiguous(memory_format=torch.channels_last),
        torch.arange(3.0)[1:],
    ],
    ids=["scalar", "nothing", "transposed", "channels last", "with an offset"],
)
def test_a_dense_block_is_not_copied(tensor):
    layout = Layout.of(tensor)
    assert layout.is_dense
    assert pack(tensor, layout).untyped_storage()._cdata == tensor.untyped_storage()._cdata


@pytest.mark.parametrize("lazy", [lambda c: c.conj(), lambda c: c.conj().imag], ids=["conjugate", "negative"])
def test_a_tensor_that_is_lazily_changed_is_sent_as_its_numbers(lazy):
    """`conj` only sets a mark on the same memory; over a wire the mark would be lost."""
    tensor = lazy(torch.complex(torch.arange(3.0), torch.arange(3.0)))
    block = pack(tensor, Layout.of(tensor))
    assert not block.is_conj()
    assert not block.is_neg()
    assert torch.equal(block, tensor)
