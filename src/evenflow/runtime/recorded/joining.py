"""How metrics of the microbatches become those of the batch: leaf by leaf, as the user says or by default."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from evenflow.errors import ConfigError

# One way for a leaf: a name of `WAYS`, or a function of the microbatches' values, in their order.
Way: TypeAlias = str | Callable[[Sequence[Any]], Any]
# What `pipeline(metrics=…)` takes: one way for all, or by the names that the metrics have.
MetricsChoice: TypeAlias = Way | Mapping[Any, Way] | None
WAYS = ("mean", "sum", "max", "min", "cat")


@dataclass(frozen=True, slots=True)
class Joining:
    """Puts the microbatches' metrics together.

    `ways` maps a name (a key of the mapping, or a place in the tuple, that the loss function returns) to what
    is done with all below it; `all` is what is done with everything.
    """

    all: Way | None
    ways: Mapping[Any, Way]

    @classmethod
    def of(cls, choice: MetricsChoice) -> "Joining":
        """Read `pipeline(metrics=…)`; raises `ConfigError` for a way that there is not."""
        if isinstance(choice, Mapping):
            for name, way in choice.items():
                _check_way(way, f"metrics= says {way!r} for {name!r}")
            return cls(None, dict(choice))
        if choice is not None:
            _check_way(choice, f"metrics={choice!r}")
        return cls(choice, {})

    def __call__(self, trees: Sequence[Any], parts: Sequence[float]) -> Any:
        """One tree out of the microbatches', which weigh `parts` in a mean (together 1).

        Leaves of which nothing is said: tensors with dimensions are concatenated along dim 0, real scalars
        averaged (one that weighs nothing is left out: a mean of nothing is no number), whole numbers added
        up, equal values kept, and anything else listed. A single tree of which nothing is said stays itself.

        Raises `ConfigError` for trees, or tensors under a name, of different forms, which no way suits.

        >>> join = Joining.of({"worst": "max", "all": "cat"})
        >>> first, second = {"worst": 3.0, "all": 1, "mean": 4.0}, {"worst": 5.0, "all": 2, "mean": 8.0}
        >>> join([first, second], [0.75, 0.25])
        {'worst': 5.0, 'all': [1, 2], 'mean': 5.0}
        """
        if len(trees) == 1 and self.all is None and not self.ways:
            return trees[0]
        flat = [pytree.tree_flatten_with_path(tree) for tree in trees]
        paths = [path for path, _ in flat[0][0]]
        spec = flat[0][1]
        if any(other != spec for _, other in flat):
            if self.all is not None or self.ways:
                raise ConfigError(
                    "metrics= says how to put the microbatches' metrics together, but they differ in form: "
                    f"{spec} and {next(other for _, other in flat if other != spec)}; return the same keys "
                    "for every microbatch"
                )
            return list(trees)
        columns = zip(*([leaf for _, leaf in leaves] for leaves, _ in flat), strict=True)
        joined = [self._joined(path, leaves, parts) for path, leaves in zip(paths, columns, strict=True)]
        return pytree.tree_unflatten(joined, spec)

    def check(self, metrics: Any, is_tensor: Callable[[Any], bool]) -> None:
        """Raise `ConfigError` where these ways do not suit what the loss function was seen to return.

        `metrics` is any tree; `is_tensor` says of a leaf whether a tensor stands there in a step.
        """
        if self.all is None and not self.ways:
            return
        if metrics is None:
            raise ConfigError(
                "metrics= is given, and the loss function returns the loss alone; return (loss, metrics)"
            )
        leaves = pytree.tree_flatten_with_path(metrics)[0]
        there = dict.fromkeys(_name(path) for path, _ in leaves)
        for name in self.ways:
            if name not in there:
                raise ConfigError(
                    f"metrics= names {name!r}, which the loss function's metrics do not have; they have "
                    f"{', '.join(map(repr, there))}"
                )
        for path, leaf in leaves:
            way = self._way(path)
            if way is None or callable(way) or way == "cat" or leaf is None:
                continue
            if not is_tensor(leaf) and not isinstance(leaf, int | float):
                raise ConfigError(
                    f"metrics= says {way!r} for {_place(path)}, which is a {type(leaf).__name__}; give "
                    "'cat', or a function of the microbatches' values"
                )

    def _way(self, path: pytree.KeyPath) -> Way | None:
        return self.all if self.all is not None else self.ways.get(_name(path))

    def _joined(self, path: pytree.KeyPath, leaves: Sequence[Any], parts: Sequence[float]) -> Any:
        way = self._way(path)
        if way is None or all(leaf is None for leaf in leaves):
            return leaves[0] if len(leaves) == 1 else _as_usual(leaves, parts)
        if callable(way):
            return way(leaves)
        if way != "cat" and isinstance(leaves[0], torch.Tensor):
            shapes = [tuple(leaf.shape) for leaf in leaves]
            if len(set(shapes)) > 1:
                raise ConfigError(
                    f"metrics= says {way!r} for {_place(path)}, whose shapes differ between microbatches "
                    f"({', '.join(map(str, dict.fromkeys(shapes)))}); give 'cat', or reduce it in the loss "
                    "function"
                )
        return _in_one_way(way, leaves, parts)


def _check_way(way: object, said: str) -> None:
    if not callable(way) and way not in WAYS:
        raise ConfigError(
            f"{said}, which is none of {', '.join(map(repr, WAYS))}, and no function of the "
            "microbatches' values"
        )


def _name(path: pytree.KeyPath) -> Any:  # a mapping's key, or a place
    """The first step of a path, as the user writes it; None for metrics that are one leaf."""
    match path[0] if path else None:
        case pytree.MappingKey(key) | pytree.SequenceKey(key):
            return key
        case pytree.GetAttrKey(name):
            return name
        case _:
            return None


def _place(path: pytree.KeyPath) -> str:
    return pytree.keystr(path) or "the metrics"


def _in_one_way(way: str, leaves: Sequence[Any], parts: Sequence[float]) -> Any:
    tensors = isinstance(leaves[0], torch.Tensor)
    if way == "cat":
        if not tensors:
            return list(leaves)
        return torch.cat([leaf if leaf.dim() else leaf[None] for leaf in leaves])
    if way == "mean":
        return weighted_sum([leaf.float() if _is_whole(leaf) else leaf for leaf in leaves], parts)
    if not tensors:
        return sum(leaves) if way == "sum" else max(leaves) if way == "max" else min(leaves)
    stacked = torch.stack(list(leaves))
    return stacked.sum(0) if way == "sum" else stacked.amax(0) if way == "max" else stacked.amin(0)


def _as_usual(leaves: Sequence[Any], parts: Sequence[float]) -> Any:
    first = leaves[0]
    if isinstance(first, torch.Tensor):
        if first.dim() > 0:
            return torch.cat(list(leaves))
        if first.is_floating_point() or first.is_complex():
            return weighted_sum(leaves, parts)
        return (
            torch.stack(list(leaves)).any() if first.dtype == torch.bool else torch.stack(list(leaves)).sum()
        )
    if isinstance(first, float):
        return weighted_sum(leaves, parts)
    if isinstance(first, int) and not isinstance(first, bool):
        return sum(leaves)
    return first if all(leaf == first for leaf in leaves) else list(leaves)


def weighted_sum(numbers: Sequence[Any], weights: Sequence[float]) -> Any:  # tensors, or plain numbers
    """The sum of weighted numbers, in order, without those that weigh nothing."""
    return sum(number * weight for number, weight in zip(numbers, weights, strict=True) if weight)


def _is_whole(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not (leaf.is_floating_point() or leaf.is_complex())


# As where the user says nothing: predictions are joined so too.
join = Joining(None, {})
