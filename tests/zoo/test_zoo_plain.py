"""Models as users write them, in plain PyTorch: a pipeline gives the plain loop's numbers."""

import pytest
from zoo_checks import Case, check
from zoo_plain import CASES


@pytest.mark.parametrize("case", CASES)
def test_two_steps_leave_what_the_plain_loop_leaves(case: Case):
    check(case)
