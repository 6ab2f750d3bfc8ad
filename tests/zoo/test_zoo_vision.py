"""Published vision and diffusion models: a pipeline gives the plain loop's numbers."""

import pytest
from zoo_checks import Case, check
from zoo_vision import ZOO


@pytest.mark.parametrize("case", ZOO.params())
def test_two_steps_leave_what_the_plain_loop_leaves(case: Case):
    check(case)
