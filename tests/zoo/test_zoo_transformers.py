"""Models of transformers give the same numbers from every cut as unsplit."""

from functools import cache

import pytest
from zoo_case import Outcome, assert_alike, pipeline_outcome, plain_outcome
from zoo_transformers import CASES, ON_RANKS

import evenflow
from unsplit import assert_same_step

BY_NAME = {case.name: case for case in CASES}
# Every case in four stages of small leaves. Each architecture, but for those that do so on two processes, in
# two stages of large ones, too, where it also predicts: its variants, named behind a comma, share that code.
SHARES = {2: None, 4: 0.0}  # number of stages -> max_leaf_share
TRIALS = [
    (case.name, stages)
    for case in CASES
    for stages in SHARES
    if stages == 4 or not ("," in case.name or case.name in ON_RANKS)
]
TOLERANCE = 1e-6  # of each tensor's maximum, where shared parameters are added up in another order


@cache
def plain(name: str) -> Outcome:
    return plain_outcome(BY_NAME[name])


@cache
def one_stage(name: str) -> Outcome:
    return pipeline_outcome(BY_NAME[name], stages=1, max_leaf_share=None)


@pytest.mark.parametrize(("name", "stages"), TRIALS)
def test_a_split_model_gives_the_numbers_of_the_unsplit_one(name, stages):
    case = BY_NAME[name]
    if case.refused:
        with pytest.raises(evenflow.EvenflowError, match=case.refused):
            pipeline_outcome(case, stages=stages, max_leaf_share=SHARES[stages], predicts=True)
        return
    expected, predicts = plain(name), stages == 2
    found = pipeline_outcome(case, stages=stages, max_leaf_share=SHARES[stages], predicts=predicts)
    if case.exact:
        assert_same_step(found.step, one_stage(name).step)
        assert_same_step(found.step, expected.step, tolerance=TOLERANCE)
    else:
        assert_same_step(found.step, expected.step)
    assert_alike(found.metrics, expected.metrics, "metrics")
    if predicts:
        assert_alike(found.prediction, expected.prediction, "prediction")
