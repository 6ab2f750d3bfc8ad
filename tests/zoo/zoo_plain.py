"""Small models in plain PyTorch, each written as a user would write it."""

from zoo_checks import Zoo
from zoo_inplace import ZOO as IN_PLACE

ZOO = Zoo()
ZOO.cases += IN_PLACE.cases
