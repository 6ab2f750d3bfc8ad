"""Palette: one colour family for each kind of op, in terminals and in pictures alike.

Blue against orange and bluish green is told apart with every common colour blindness: Okabe and Ito, "Color
Universal Design", 2008. Each family runs from light to dark as the microbatches go on.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from evenflow.ir.op import Backward, ComputeOp, Forward, InputGrad, Overlap, SimpleOp, WeightGrad

Colour: TypeAlias = tuple[float, float, float]

IDLE: Colour = (0.91, 0.91, 0.91)
INK: Colour = (0.13, 0.13, 0.13)
WHITE: Colour = (1.0, 1.0, 1.0)
PURPLE: Colour = (0.47, 0.28, 0.66)
RED: Colour = (0.80, 0.15, 0.15)

NAMES: Mapping[type[ComputeOp], str] = MappingProxyType(
    {
        Forward: "forward",
        Backward: "backward",
        InputGrad: "input gradient",
        WeightGrad: "weight gradient",
        Overlap: "overlap",
    }
)

_FAMILIES: dict[type[ComputeOp], tuple[Colour, Colour]] = {
    Forward: ((0.70, 0.85, 0.96), (0.03, 0.32, 0.61)),
    Backward: ((0.98, 0.72, 0.42), (0.72, 0.27, 0.00)),
    InputGrad: ((1.00, 0.93, 0.72), (0.95, 0.66, 0.26)),
    WeightGrad: ((0.74, 0.91, 0.82), (0.00, 0.45, 0.33)),
    Overlap: ((0.84, 0.76, 0.93), (0.36, 0.17, 0.55)),
}


def colour(kind: type[ComputeOp], share: float) -> Colour:
    """Return the colour of a kind of op, `share` (0 to 1) of the way from the family's light to its dark.

    >>> colour(Forward, 0.0)
    (0.7, 0.85, 0.96)
    """
    light, dark = _FAMILIES[kind]
    red, green, blue = (low + (high - low) * share for low, high in zip(light, dark, strict=True))
    return red, green, blue


def colour_of(op: SimpleOp, num_microbatches: int) -> Colour:
    """Return the colour of one op of a step with so many microbatches.

    >>> colour_of(Forward(0, 0), 4) == colour(Forward, 0.0)
    True
    """
    return colour(type(op), op.microbatch / max(1, num_microbatches - 1))


def contrast(ground: Colour) -> Colour:
    """Return ink or white, whichever is the easier to read on that ground (weights: ITU-R BT.601 luma).

    >>> contrast((1.0, 1.0, 1.0)) == INK
    True
    """
    red, green, blue = ground
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else WHITE


def hexadecimal(tone: Colour) -> str:
    """Return a colour as `#rrggbb`.

    >>> hexadecimal((1.0, 0.0, 0.5))
    '#ff0080'
    """
    return "#" + "".join(f"{round(255 * part):02x}" for part in tone)
