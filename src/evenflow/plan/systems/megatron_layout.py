"""Megatron-Core's `--pipeline-model-parallel-layout`: which layers each of its stages holds, as text.

Sources: "Custom Pipeline Model Parallel Layout" (experimental) of https://docs.nvidia.com/megatron-core/
developer-guide/latest/user-guide/features/pipeline_parallel_layout.html, and `parse_str_to_list` and
`validate_layer_layout` of megatron/core/transformer/pipeline_parallel_layer_layout.py of
https://github.com/NVIDIA/Megatron-LM (read in November 2026).

    Et*3|(tt|)*29,m|L      E embedding, t decoder layer, m multi-token prediction, L loss; | between stages

`x*N` stands for N times the symbol (or bar) before it, `(...)*N` for N times what is in the parentheses,
which hold no others; commas count for nothing. A stage may be empty. Stage s is on pipeline rank s mod p, as
`Placement.looped` deals them out: first every rank's first stage, then every rank's second one.
"""

import re
from collections.abc import Sequence

from evenflow.errors import ConfigError
from evenflow.foreign import shown

_MOST = 100_000  # symbols; a text of a few letters may stand for any number
_ITEM = re.compile(r"(?:\((?P<group>(?:[EtmL|](?:\*\d+)?)+)\)|(?P<symbol>[EtmL|]))(?:\*(?P<times>\d+))?")
_ORDER = re.compile(r"Et*m*L")


def parse_layout(text: str) -> tuple[str, ...]:
    """Return what each stage holds, a symbol for each layer; `ConfigError` for what Megatron refuses.

    >>> parse_layout("Et*3|(tt|)*2,m|L")
    ('Ettt', 'tt', 'tt', 'm', 'L')
    >>> parse_layout("E||t|L")
    ('E', '', 't', 'L')
    """
    written = text.replace(",", "")
    unrolled = _unrolled(_unrolled(written, text), text)  # the second time for the symbols inside parentheses
    stages = tuple(unrolled.split("|"))
    _check(stages, f"the layout {shown(text)}")
    return stages


def _unrolled(written: str, text: str) -> str:
    at, size = 0, 0
    pieces = []
    while at < len(written):
        item = _ITEM.match(written, at)
        if item is None or (item["group"] and not item["times"]):
            raise ConfigError(
                f"the layout {shown(text)} cannot be read from {shown(written[at:])} on: write E, t, m and L "
                "for layers, | between stages, x*N, and (...)*N without parentheses inside"
            )
        times = item["times"] or "1"
        # By its digits first, as Python converts no more than some thousands.
        size += _MOST + 1 if len(times) > len(str(_MOST)) else len(item["group"] or "t") * int(times)
        if size > _MOST:
            raise ConfigError(f"the layout {shown(text)} stands for more than {_MOST} layers and stages")
        pieces.append((item["group"] or item["symbol"]) * int(times))
        at = item.end()
    return "".join(pieces)


def _check(stages: Sequence[str], what: str) -> None:
    if not _ORDER.fullmatch("".join(stages)):
        raise ConfigError(
            f"{what} must hold one E, then every t, then every m, and one L last, got "
            f"{shown(''.join(stages))}"
        )


def format_layout(stages: Sequence[str]) -> str:
    """Return the shortest layout of these stages; the inverse of `parse_layout`.

    Of all ways to count symbols within stages and whole stages that repeat. Raises `ConfigError` for stages
    whose layers are no embedding, decoder layers, predictions of more tokens and loss, in this order.

    >>> format_layout(["Ettt", *["tt"] * 29, "m", "L"])
    'Et*3|(tt|)*29m|L'
    >>> format_layout(["Et", "tt", "tL"])
    'Et|tt|tL'
    """
    _check(stages, "a layout")
    # The last stage has no bar behind it, so that no repetition reaches into it.
    texts = [f"{_counted(stage)}|" for stage in stages[:-1]] + [_counted(stages[-1])]
    best = [""]  # the shortest for none of the texts, for the last, for the last two, ...
    for start in reversed(range(len(texts))):
        options = [texts[start] + best[-1]]
        for period in range(1, (len(texts) - start) // 2 + 1):
            unit = texts[start : start + period]
            times, at = 1, start + period
            while texts[at : at + period] == unit:
                times, at = times + 1, at + period
                options.append(f"({''.join(unit)})*{times}{best[len(texts) - at]}")
        best.append(min(options, key=len))
    return best[-1]


def _counted(stage: str) -> str:
    """A stage with its longer rows counted.

    >>> _counted("Ettt"), _counted("tt"), _counted("")
    ('Et*3', 'tt', '')
    """
    return re.sub(r"(t{3,}|m{3,})", lambda row: f"{row[0][0]}*{len(row[0])}", stage)
