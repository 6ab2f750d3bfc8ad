"""All plain-PyTorch models of the zoo, each written as a user would write it."""

import zoo_corners
import zoo_inplace
import zoo_more_corners
import zoo_shapes
import zoo_shared
import zoo_state
import zoo_unseen

CASES = [
    param
    for module in (zoo_inplace, zoo_unseen, zoo_shared, zoo_state, zoo_shapes, zoo_corners, zoo_more_corners)
    for param in module.ZOO.params()
]
