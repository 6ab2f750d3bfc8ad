"""What does not fit between the tensors of a folder and those of a model, in words, with every name."""

from collections.abc import Collection, Mapping, Sequence


def listed(kinds: Mapping[str, Collection[str]]) -> str:
    """The kinds of faults that there are, each with all its names; "" where there are none.

    >>> listed({"missing": {"b", "a"}, "unexpected": ()})
    '2 missing: a, b'
    """
    found = ((what, sorted(names)) for what, names in kinds.items() if names)
    return "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in found)


def misshapen(name: str, there: Sequence[int], here: Sequence[int]) -> str:
    """A tensor of another shape, among others.

    >>> misshapen("w", (2, 3), (2,))
    'w is [2, 3] there and [2] here'
    """
    return f"{name} is {[*there]} there and {[*here]} here"
