"""The norm of all gradients, over all ranks, and clipping by it.

Each parameter's norm is taken where its gradient is whole, and the norm of those in the model's own order:
so the result has the same bits wherever the model is cut. Without ranks that share a parameter they are those
of `torch.nn.utils.clip_grad_norm_` over `model.parameters()`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from evenflow.errors import ConfigError
from evenflow.graph.nouns.dtensors import is_dtensor
from evenflow.runtime.ranks.world import World


@dataclass(frozen=True, slots=True)
class Piece:
    """A gradient that this process answers for, or a part of one of which others have the rest."""

    name: str
    gradient: torch.Tensor
    is_part: bool = False


class GradientNorm:
    """Of the parameters of these names, over all processes of `world`.

    >>> from evenflow.runtime.ranks.world import SingleProcess
    >>> norm = GradientNorm(SingleProcess(), ["a", "b"])
    >>> norm([Piece("b", torch.tensor([0.0, 3.0])), Piece("a", torch.tensor([4.0]))])
    tensor(5.)
    """

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self._world = world
        self._places = {name: at for at, name in enumerate(names)}

    def __call__(self, pieces: Iterable[Piece]) -> torch.Tensor:
        """The 2-norm; collective. Each gradient, or part of one, comes from one process."""
        found = list(pieces)
        device = found[0].gradient.device if found else self._world.device
        # Norms of what is whole, and squares of those of parts, of which only the sum has a meaning.
        table = torch.zeros(2 * len(self._places), dtype=torch.float64, device=device)
        if found:
            norms = torch.stack([_norm(piece.gradient).double().to(device) for piece in found])
            parts = torch.tensor([piece.is_part for piece in found]).to(device)
            at = [self._places[piece.name] + piece.is_part * len(self._places) for piece in found]
            table.index_put_((torch.tensor(at).to(device),), torch.where(parts, norms.square(), norms))
        self._world.add_up(table).wait()
        whole, squares = table.chunk(2)
        total: torch.Tensor = torch.linalg.vector_norm((whole + squares.sqrt()).float())
        return total


def piece_of(name: str, gradient: torch.Tensor) -> Piece | None:
    """This process's piece of a gradient that may be a DTensor; None where another answers for it."""
    if not is_dtensor(gradient):
        return Piece(name, gradient)
    coordinate = gradient.device_mesh.get_coordinate()
    assert coordinate is not None, "this process holds a part"
    pairs = list(zip(gradient.placements, coordinate, strict=True))
    if any(placement.is_replicate() and at for placement, at in pairs):
        return None
    return Piece(name, gradient.to_local(), any(placement.is_shard() for placement, _ in pairs))


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """In float32 at least: in 16 bits the squares would not add up."""
    is_small = gradient.dtype.itemsize < 4
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32 if is_small else None)
    return norm


def clip_factor(norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """What gradients are multiplied by, so that their norm is at most `clip_norm`: as torch's own.

    >>> clip_factor(torch.tensor(5.0), 1.0)
    tensor(0.2000)
    """
    return torch.clamp(clip_norm / (norm + 1e-6), max=1.0)


def check_clip_norm(clip_norm: object) -> None:
    """Raise `ConfigError` for a bound that is none."""
    is_number = isinstance(clip_norm, int | float) and not isinstance(clip_norm, bool)
    if clip_norm is not None and not (is_number and clip_norm > 0):  # type: ignore[operator]  # a number
        raise ConfigError(
            f"clip_norm={clip_norm!r} must be a positive number (math.inf measures the norm alone)"
        )
