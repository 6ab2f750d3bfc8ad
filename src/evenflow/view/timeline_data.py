"""What a page's timeline is drawn from: lanes, memory, edges, colours, as `page/timeline.js` takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from evenflow.ir.op import Backward, Forward, InputGrad, Overlap, WeightGrad
from evenflow.view.palette import IDLE, INK, NAMES, WHITE, Colour, colour, contrast, hexadecimal

# What JSON is made of: numbers, texts, lists and mappings of these.
Data = dict[str, Any]

_LETTERS = {"F": Forward, "B": Backward, "I": InputGrad, "W": WeightGrad, "O": Overlap}
_SHARES = [shade / 7 for shade in range(8)]  # of a kind's colours, from the first microbatch to the last


def timeline_data(
    ranks: Sequence[Data],
    *,
    num_microbatches: int,
    edges: Sequence[Mapping[str, Any]] = (),
    counts_microbatches: bool = False,
) -> Data:
    """Return the timeline of these ranks (`rank_data`); edges are `EdgeRecord`s, as mappings.

    With `counts_microbatches` what is held is counted in microbatches' activations, and not in bytes.

    >>> timeline_data([], num_microbatches=4)["kinds"]["F"]["name"]
    'forward'
    """
    kinds = {
        letter: {"name": NAMES[kind], "tones": [_tone(colour(kind, share)) for share in _SHARES]}
        for letter, kind in _LETTERS.items()
    }
    return {
        "microbatches": num_microbatches,
        "kinds": kinds,
        "ink": hexadecimal(INK),
        "idle": hexadecimal(IDLE),
        "edges": list(edges),
        "countsMicrobatches": counts_microbatches,
        "ranks": list(ranks),
    }


def rank_data(
    *,
    predicted: Data,
    measured: Data | None = None,
    held: Sequence[tuple[float, float]] = (),
    peak: float | None = None,
    cap: float | None = None,
) -> Data:
    """Return a rank: its lanes (`lane_data`), and what it held from which second on, at most, and may hold.

    >>> rank_data(predicted=lane_data(["0F0"], [0.0], [0.0], [1.0]), held=[(0.0, 3.0)])["held"]
    {'seconds': [0.0], 'amounts': [3.0]}
    """
    return {
        "measured": measured,
        "predicted": predicted,
        "held": {"seconds": [at for at, _ in held], "amounts": [amount for _, amount in held]}
        if held
        else None,
        "peak": peak,
        "cap": cap,
    }


def lane_data(
    ops: Sequence[str],
    came: Sequence[float],
    start: Sequence[float],
    end: Sequence[float],
    held_bytes: Sequence[int] = (),
) -> Data:
    """Return a lane: ops as text, with the seconds at which each came, started and ended, in turn.

    >>> lane_data(["0F0"], [0.0], [0.0], [1.0])["end"]
    [1.0]
    """
    return {"ops": ops, "came": came, "start": start, "end": end, "held_bytes": held_bytes}


def _tone(ground: Colour) -> Data:
    """A colour from 0 to 255, and whether a name on it is to be white."""
    return {"parts": [round(255 * part) for part in ground], "dark": contrast(ground) == WHITE}
