"""What ranks compare of their batches: the form of all, and the numbers of small ones and of samples."""

import pytest
import torch

from evenflow.pipe.given.splitter import Prepared, Splitter
from evenflow.pipe.step.agree import fingerprint

SPLIT = Splitter(2, 4, None, None)


def found(prepared):
    return fingerprint(prepared, [])


def batch(rows=8, width=4):
    return {"x": torch.arange(float(rows * width)).view(rows, width), "name": "a"}


def changed(at):
    other = batch()
    other["x"].view(-1)[at] += 1
    return other


@pytest.mark.parametrize(
    "other",
    [changed(0), changed(31), batch(12), batch(width=5), batch() | {"name": "b"}, {"y": batch()["x"]}],
    ids=["first", "last", "rows", "width", "value", "key"],
)
def test_batches_that_differ_are_told_apart(other):
    assert found(SPLIT(batch())) == found(SPLIT(batch()))
    assert found(SPLIT(other)) != found(SPLIT(batch()))


def test_other_microbatches_of_one_batch_are_told_apart():
    assert found(SPLIT(batch())) != found(Splitter(2, 2, None, None)(batch()))


def test_ready_microbatches_are_told_apart():
    ready = [Prepared([batch(), last], range(2)) for last in (batch(), changed(3))]
    assert found(ready[0]) != found(ready[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64, torch.bfloat16])
def test_large_batches_are_told_apart_by_samples(dtype):
    torch.manual_seed(0)
    large = (torch.randn(2**12, 2**10) > 0).to(dtype)
    shuffled = large[torch.randperm(len(large))]
    ended = large.clone()
    ended[-1, -1] = 1 - ended[-1, -1].to(torch.int8).item() if dtype is torch.bool else 7
    first, second, last = (found(SPLIT({"x": each})) for each in (large, shuffled, ended))
    assert len({first[1], second[1], last[1]}) == 3
    assert first == found(SPLIT({"x": large.clone()}))


def test_rows_with_equal_borders_are_told_apart():
    images = torch.zeros(256, 1, 64, 64)
    images[:, :, 8:-8, 8:-8] = torch.randn(256, 1, 48, 48)
    others = torch.zeros_like(images)
    others[:, :, 8:-8, 8:-8] = torch.randn(256, 1, 48, 48)
    assert found(SPLIT({"x": images})) != found(SPLIT({"x": others}))


def test_the_layout_of_numbers_is_no_matter_to_them():
    wide = torch.randn(2**9, 2**11)
    assert found(SPLIT({"x": wide}))[1] == found(SPLIT({"x": wide.t().contiguous().t()}))[1]
