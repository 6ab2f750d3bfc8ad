"""Whole layers: the repeated blocks of a recorded model, and cuts that stand only between them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from evenflow.errors import ConfigError
from evenflow.foreign import shown
from evenflow.plan.blocks import block_of
from evenflow.plan.chain import Chain
from evenflow.plan.plan import Plan, node_labels


@dataclass(frozen=True, slots=True)
class Layers:
    """Where each block of a chain begins, and its `end`: the first node behind the last block.

    What stands before the first block (an embedding) is one layer, what stands behind the last (a head and
    the loss) another.
    """

    begins: tuple[int, ...]
    end: int

    @property
    def places(self) -> tuple[int, ...]:
        """Where a cut parts no layer, ascending.

        >>> layers_of(["embed", "h.0.attention", "h.0.mlp", "h.1", "head"]).places
        (1, 3, 4)
        """
        return (*(place for place in self.begins if place), self.end)

    def counts(self, positions: Sequence[int]) -> tuple[int, ...]:
        """How many blocks each stage between the cuts holds.

        >>> layers_of(["embed", "h.0.attention", "h.0.mlp", "h.1", "head"]).counts([3])
        (1, 1)
        """
        bounds = (0, *positions, self.end + 1)
        return tuple(sum(first <= begin < last for begin in self.begins) for first, last in pairwise(bounds))


def layers_of(names: Sequence[str]) -> Layers:
    """The blocks that the names of nodes tell of, as `block_of` has them.

    Raises `ConfigError` for a program without blocks, with something between two of them, and with nothing
    behind the last.
    """
    blocks = [block_of(name) for name in names]
    numbered = [node for node, block in enumerate(blocks) if block is not None]
    if not numbered:
        raise ConfigError(
            f"the program has no numbered layers to keep whole ({', '.join(names[:5])}, …): plan without "
            "--target"
        )
    first, end = numbered[0], numbered[-1] + 1
    between = next((names[node] for node in range(first, end) if blocks[node] is None), None)
    if between is not None or end == len(names):
        where = f"{between} stands between two of them" if between else "nothing stands behind the last"
        raise ConfigError(
            f"the program is no embedding, layers and a head: {where}; the other systems' ways to cut do not "
            "fit it: plan without --target"
        )
    begins = [node for node in range(first, end) if node == first or blocks[node] != blocks[node - 1]]
    return Layers(tuple(begins), end)


def layer_labels(names: Sequence[str]) -> tuple[str, ...]:
    """The first node of each block of a program, and the node behind the last, as a plan keeps them.

    Empty for a program that `layers_of` refuses.

    >>> layer_labels(["embed", "h.0.attention", "h.0.mlp", "h.1", "head"]), layer_labels(["conv", "pool"])
    (('h.0.attention', 'h.1', 'head'), ())
    """
    try:
        layers = layers_of(names)
    except ConfigError:
        return ()
    labels = node_labels(names)
    return tuple(labels[at] for at in (*layers.begins, layers.end))


def planned_layers(plan: Plan) -> tuple[Layers, tuple[int, ...]]:
    """A plan's whole layers, as if each was one node, and where the plan cuts them.

    Raises `ConfigError` for a plan that names no such layers, and for a cut within one.
    """
    if not plan.layers:
        raise ConfigError(
            "the plan names no whole layers: its program is no embedding, repeated blocks and a head, or an "
            "older Evenflow has made it"
        )
    if len(plan.layers) == 1:
        raise ConfigError(
            f"the plan's layers are {shown(plan.layers[0])} alone: list the first node of each block, and "
            "last the node behind them"
        )
    embeds = plan.stages[0].first != plan.layers[0]
    at = {label: number + embeds for number, label in enumerate(plan.layers)}
    positions: list[int] = []
    for number, stage in enumerate(plan.stages[1:], 1):
        if stage.first not in at:
            raise ConfigError(
                f"its stage {number} begins with {shown(stage.first)}, within a layer, and it cuts between "
                "whole layers only"
            )
        positions.append(at[stage.first])
    if positions != sorted(set(positions)):
        raise ConfigError("its stages do not begin in the order of their layers")
    end = len(plan.layers) - 1 + embeds
    return Layers(tuple(range(embeds, end)), end), tuple(positions)


def cut_only_at(chain: Chain, places: Iterable[int]) -> Chain:
    """The chain where a cut may stand at these places only, and at those only where it could before."""
    allowed = frozenset(places)
    return replace(chain, legal=tuple(may and node in allowed for node, may in enumerate(chain.legal)))
