"""Lower bounds: how short no schedule can be, whatever its order. Standard library only.

Read `instance` for what is bounded, then `whole` for how its parts, `chain`, `loads` and `rank`, make the
bounds. Each argument is proven where it is computed. None needs equal stages, ranks, delays or caps.

Sources: the first phase, and the last one of the linear placement, give the closed forms of Qi et al., "Zero
Bubble Pipeline Parallelism", 2023, and "Pipeline Parallelism with Controllable Memory", 2024. The last phase
of other placements, turnover and area are Evenflow's own; the tests hold them against exact optima.
"""

from evenflow.bounds.instance import Instance, instance_of
from evenflow.bounds.rank import Bound
from evenflow.bounds.whole import Bounds, lower_bounds

__all__ = ["Bound", "Bounds", "Instance", "instance_of", "lower_bounds"]
