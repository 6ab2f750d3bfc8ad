"""Numbers that are none: how many NaNs and infinities a tensor holds, and how large its other numbers are."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from evenflow.graph.nouns.dtensors import local_part


@dataclass(frozen=True, slots=True)
class Count:
    """Of `num` numbers, how many are bad. `largest` is the size of the largest of the others.

    >>> Count.of([torch.tensor([1.0, -4.0, float("nan"), float("-inf")])])
    Count(num=4, num_nan=1, num_inf=1, num_negative=1, largest=4.0)
    >>> print(Count(num=4, num_nan=1))
    1 bad of 4 numbers (1 nan)
    """

    num: int = 0
    num_nan: int = 0
    num_inf: int = 0
    num_negative: int = 0  # of the infinities: a mask has negative ones
    largest: float = 0.0

    @staticmethod
    def of(tensors: Iterable[torch.Tensor]) -> "Count":
        """The count of several tensors together; those that hold no floating-point numbers count nothing."""
        numbers = [each for tensor in tensors if (each := _numbers(tensor)) is not None]
        return Count.together(map(_counted, numbers))

    @staticmethod
    def together(counts: Iterable["Count"]) -> "Count":
        """One count of all that several have counted."""
        found = list(counts)
        return Count(
            sum(each.num for each in found),
            sum(each.num_nan for each in found),
            sum(each.num_inf for each in found),
            sum(each.num_negative for each in found),
            max((each.largest for each in found), default=0.0),
        )

    @property
    def num_bad(self) -> int:
        """How many are not finite."""
        return self.num_nan + self.num_inf

    def __str__(self) -> str:
        kinds = ((self.num_nan, "nan"), (self.num_inf, "inf"))
        return (
            f"{self.num_bad} bad of {self.num} numbers ({', '.join(f'{n} {kind}' for n, kind in kinds if n)})"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all of a tensor's numbers are finite; reading that waits for the device.

    >>> is_finite(torch.tensor([1.0, float("inf")])), is_finite(torch.tensor([1]))
    (False, True)
    """
    numbers = _numbers(tensor)
    if numbers is None:
        return True
    # A sum takes a thirtieth of the time, and what is bad stays so in it; but it may be too large itself.
    total = numbers.sum(dtype=torch.float32 if numbers.dtype.itemsize < 4 else None)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(numbers).all())


def _numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    """What this process has of a tensor's numbers; None where none of them can be bad."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return None
    numbers = local_part(tensor.detach())
    if numbers.is_nested:
        numbers = numbers.values()
    elif numbers.layout is not torch.strided:
        numbers = numbers.coalesce().values() if numbers.layout is torch.sparse_coo else numbers.values()
    return numbers.float() if numbers.dtype.itemsize == 1 else numbers  # of 8 bits torch can ask nothing


@torch.no_grad()
def _counted(numbers: torch.Tensor) -> Count:
    finite = torch.isfinite(numbers)
    infinite = numbers.isinf()
    sizes = torch.where(finite, numbers.abs(), 0)
    return Count(
        numbers.numel(),
        int(numbers.isnan().sum()),
        int(infinite.sum()),
        0 if numbers.is_complex() else int((infinite & (numbers < 0)).sum()),
        float(sizes.max()) if numbers.numel() else 0.0,
    )
