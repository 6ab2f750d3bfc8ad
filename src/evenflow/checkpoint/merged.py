"""The states of a run's processes as one: what each owns, put together."""

from collections.abc import Mapping, Sequence
from typing import Any


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of a run's processes as one.

    >>> parts = [{"step": 2, "model": {"a": 1}}, {"step": 2, "model": {"b": 2}}]
    >>> merged(parts)
    {'step': 2, 'model': {'a': 1, 'b': 2}}
    """
    whole = dict(states[0])
    for state in states[1:]:
        for key, value in state.items():
            if isinstance(value, Mapping):
                whole[key] = {**whole[key], **value}
    return whole
