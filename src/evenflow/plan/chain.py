"""What planning must know of a recorded program: a chain of nodes, of which each stage takes some in a row.

It is data, made by measuring (`cost.profile`), by counting (`cost.estimate`) or from a table of times; from
here on nobody needs the model, or torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from evenflow.errors import ConfigError

_LEAST_MATRIX = 2**12  # elements


@dataclass(frozen=True, slots=True)
class Held:
    """Memory that a stage holds once if it has any of these nodes (ascending indexes of the chain).

    What a single node keeps for itself names that node alone; a tensor that several nodes keep, or a
    parameter that several use, names them all. `handed`: the place among `Chain.handed` of what nodes hand to
    each other; None for anything else.

    >>> Held(num_bytes=8.0, nodes=(0, 3)).handed is None
    True
    """

    num_bytes: float
    nodes: tuple[int, ...]
    handed: int | None = None


@dataclass(frozen=True, slots=True)
class Handed:
    """Memory that a node makes and other nodes are given: by places in the chain.

    `maker` is None where it is made of the batch alone, on each stage that needs it.

    >>> Handed(num_bytes=8.0, maker=0, users=(1, 3)).users
    (1, 3)
    """

    num_bytes: float
    maker: int | None
    users: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model, under the first of its names, and the nodes that use it.

    One that `is_expert` belongs to experts, of which each token uses some: expert parallelism parts it.

    >>> weight = Parameter("head.weight", num_elements=2**20, num_bytes=2**22, trains=True, nodes=(3,))
    >>> weight.is_matrix
    True
    """

    name: str
    num_elements: int
    num_bytes: int
    trains: bool
    nodes: tuple[int, ...]
    is_expert: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is taken for one, by its size: smaller parameters are norms and biases."""
        return self.num_elements >= _LEAST_MATRIX


def together(parameters: Iterable[Parameter]) -> tuple[Parameter, ...]:
    """The parameters that the same nodes use and that are of one kind, as one: much less to count.

    >>> [
    ...     one.num_bytes
    ...     for one in together([Parameter("a", 2, 8, True, (0,)), Parameter("b", 1, 4, True, (0,))])
    ... ]
    [12]
    """
    found: dict[tuple[tuple[int, ...], bool, bool], Parameter] = {}
    for one in parameters:
        key = one.nodes, one.trains, one.is_expert
        same = found.get(key)
        found[key] = (
            one
            if same is None
            else replace(
                same,
                num_elements=same.num_elements + one.num_elements,
                num_bytes=same.num_bytes + one.num_bytes,
            )
        )
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long each node of a chain takes for one microbatch on one kind of device: seconds.

    Raises `ConfigError` for lengths that differ.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.forward) == len(self.input_grad) == len(self.weight_grad):
            raise ConfigError(
                f"times of {len(self.forward)} forwards, {len(self.input_grad)} input gradients and "
                f"{len(self.weight_grad)} weight gradients: give each node all three"
            )

    @property
    def total(self) -> tuple[float, ...]:
        """Forward and both gradients of each node.

        >>> Seconds((1.0, 2.0), (1.0, 2.0), (0.5, 1.0)).total
        (2.5, 5.0)
        """
        return tuple(map(sum, zip(self.forward, self.input_grad, self.weight_grad, strict=True)))


# What each node of a chain has where nothing else is said.
_BY_DEFAULT: Mapping[str, float | None] = MappingProxyType(
    {
        "forward_transient_bytes": 0.0,
        "backward_transient_bytes": 0.0,
        "cut_bytes": 0.0,
        "legal": True,
        "expert_bytes": 0.0,
        "recomputable": True,
        "again_bytes": None,
    }
)


@dataclass(frozen=True, slots=True)
class Chain:
    """A recorded program as planning sees it. All of it is for one microbatch of `num_rows` rows.

    - `names` and `flops` (of the forward, operations) of each node, in program order.
    - `seconds`: by the name of a kind of device.
    - `saved`: what the forward keeps for the backward; `kept`: the part of it that the weight gradients need,
      which stays after the input gradients. Each a list of `Held`.
    - `forward_transient_bytes`, `backward_transient_bytes`: the most that a node allocates while it runs,
      beyond what it keeps.
    - `cut_bytes[c]`: what crosses a cut before node c, all values of which a later node is in need; entry 0
      is not used. `legal[c]`: whether a cut may stand there.
    - `skips`: what may cross several cuts: values that more than the node after their maker needs. Each names
      its maker, then its users.
    - `handed`: all that nodes hand to each other; empty where nobody knows. `recomputable[n]`: whether node n
      may compute its forward again in the backward.
    - `again_bytes`: of each node that is recomputed what its region saves when it runs again, at the node
      whose backward needs it last; None of the others.
    - `expert_bytes`: of the activations that each node's forward hands to experts, one for each expert that a
      token goes to.

    By default nodes hold nothing and hand over nothing, all may be recomputed, and a cut may stand anywhere.
    Raises `ConfigError` for tuples of other lengths than `names`.

    >>> seconds = {"RTX 4090": Seconds((1.0, 2.0), (1.0, 2.0), (0.5, 1.0))}
    >>> chain = Chain(("embedding", "head"), 1, (1e9, 2e9), seconds, saved=(Held(8.0, (0, 1)),))
    >>> chain.num_nodes, chain.legal
    (2, (True, True))
    """

    names: tuple[str, ...]
    num_rows: int
    flops: tuple[float, ...]
    seconds: Mapping[str, Seconds]
    saved: tuple[Held, ...] = ()
    kept: tuple[Held, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    forward_transient_bytes: tuple[float, ...] = ()
    backward_transient_bytes: tuple[float, ...] = ()
    cut_bytes: tuple[float, ...] = ()
    legal: tuple[bool, ...] = ()
    expert_bytes: tuple[float, ...] = ()
    skips: tuple[Held, ...] = ()
    handed: tuple[Handed, ...] = ()
    recomputable: tuple[bool, ...] = ()
    again_bytes: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for name, each in _BY_DEFAULT.items():
            if not getattr(self, name):
                object.__setattr__(self, name, (each,) * self.num_nodes)
        per_node = {
            "flops": self.flops,
            **{name: getattr(self, name) for name in _BY_DEFAULT},
            **{f"seconds on {kind}": seconds.forward for kind, seconds in self.seconds.items()},
        }
        for what, given in per_node.items():
            if len(given) != len(self.names):
                raise ConfigError(f"{what}: {len(given)} entries for {len(self.names)} nodes; give each one")

    @property
    def num_nodes(self) -> int:
        """How many nodes the chain has."""
        return len(self.names)
