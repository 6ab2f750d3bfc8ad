"""Models of transformers give the same numbers from every cut as unsplit."""

from functools import cache

import pytest
from zoo_case import Case, Outcome, assert_alike, pipeline_outcome, plain_outcome
from zoo_transformers import CASES

from unsplit import assert_same_step

BY_NAME = {case.name: case for case in CASES}
SHARES = {2: None, 4: 0.0}  # number of stages -> max_leaf_share: both choices of leaves get used
TOLERANCE = 1e-6  # of each tensor's maximum, where shared parameters are added up in another order


def marked(case: Case, stages: int):
    marks = pytest.mark.xfail(reason=case.fails, strict=True) if case.fails else ()
    return pytest.param(case.name, stages, marks=marks)


@cache
def plain(name: str) -> Outcome:
    return plain_outcome(BY_NAME[name])


@cache
def one_stage(name: str) -> Outcome:
    return pipeline_outcome(BY_NAME[name], stages=1, max_leaf_share=None)


@pytest.mark.parametrize(("name", "stages"), [marked(case, stages) for case in CASES for stages in SHARES])
def test_a_split_model_gives_the_numbers_of_the_unsplit_one(name, stages):
    case, expected = BY_NAME[name], plain(name)
    found = pipeline_outcome(case, stages=stages, max_leaf_share=SHARES[stages])
    if case.exact:
        assert_same_step(found.step, one_stage(name).step)
        assert_same_step(found.step, expected.step, tolerance=TOLERANCE)
    else:
        assert_same_step(found.step, expected.step)
    assert_alike(found.metrics, expected.metrics, "metrics")
    assert_alike(found.prediction, expected.prediction, "prediction")
