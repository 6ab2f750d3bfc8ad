"""Models of transformers give the same numbers from every cut as unsplit."""

import pytest
from zoo_case import Case, assert_alike, pipeline_outcome, plain_outcome
from zoo_transformers import CASES, ON_RANKS

import evenflow
from recorded_once import recorded_once
from unsplit import assert_same_step

TOLERANCE = 1e-6  # of each tensor's maximum, where shared parameters are added up in another order


def cuts_of(case: Case) -> dict[int, float | None]:
    """By number of stages their leaves' largest share: four stages of small leaves.

    Each architecture, but for those that do so on two processes, in two stages of large ones, too, where it
    also predicts: its variants, named behind a comma, share that code.
    """
    return {4: 0.0} if "," in case.name or case.name in ON_RANKS else {2: None, 4: 0.0}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_split_model_gives_the_numbers_of_the_unsplit_one(case: Case):
    cuts = cuts_of(case)
    if case.refused:
        for stages, share in cuts.items():
            with pytest.raises(evenflow.EvenflowError, match=case.refused):
                pipeline_outcome(case, stages=stages, max_leaf_share=share, predicts=True)
        return
    expected = plain_outcome(case)
    with recorded_once({}):
        one_stage = pipeline_outcome(case, stages=1, max_leaf_share=None) if case.exact else None
        for stages, share in cuts.items():
            found = pipeline_outcome(case, stages=stages, max_leaf_share=share, predicts=stages == 2)
            if one_stage is not None:
                assert_same_step(found.step, one_stage.step)
                assert_same_step(found.step, expected.step, tolerance=TOLERANCE)
            else:
                assert_same_step(found.step, expected.step)
            assert_alike(found.metrics, expected.metrics, "metrics")
            if stages == 2:
                assert_alike(found.prediction, expected.prediction, "prediction")
