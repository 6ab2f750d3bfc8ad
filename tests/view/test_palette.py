"""Colours: a family for each kind, told apart and darkening."""

from itertools import combinations

import pytest

from evenflow.ir import Backward, Forward, InputGrad, WeightGrad
from evenflow.view.palette import NAMES, colour, colour_of, contrast


def test_the_hues_are_those_of_the_legend() -> None:
    red, green, blue = colour(Forward, 0.5)
    assert blue > green > red
    for kind in (Backward, InputGrad):
        red, green, blue = colour(kind, 0.5)
        assert red > green > blue
    assert sum(colour(InputGrad, 0.5)) > sum(colour(Backward, 0.5))
    red, green, blue = colour(WeightGrad, 0.5)
    assert green > max(red, blue)


@pytest.mark.parametrize("kind", [Forward, Backward, InputGrad, WeightGrad])
def test_a_family_darkens_with_the_microbatches(kind) -> None:
    family = [colour_of(kind(0, microbatch), 4) for microbatch in range(4)]
    assert sorted(family, key=sum, reverse=True) == family
    assert len(set(family)) == 4


def test_no_two_kinds_are_alike() -> None:
    for one, other in combinations([colour(kind, 0.5) for kind in NAMES], 2):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.3


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_letters_can_be_read_on_every_colour(kind, share) -> None:
    ground = colour(kind, share)
    luma = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (ground, contrast(ground))]
    assert abs(luma[0] - luma[1]) > 0.35
