"""Megatron's layouts: its own examples are read as it reads them, and what is written is read again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenflow.errors import ConfigError
from evenflow.plan.systems.megatron_layout import format_layout, parse_layout

# "Custom Pipeline Model Parallel Layout" of docs.nvidia.com/megatron-core, and the docstring of
# `parse_str_to_list` in megatron/core/transformer/pipeline_parallel_layer_layout.py.
DOCUMENTED = {
    "Et*3|(tt|)*29,m|L": ("Ettt", *["tt"] * 29, "m", "L"),
    "Ettt|(tt|)*29,m|L": ("Ettt", *["tt"] * 29, "m", "L"),
    "E||t|L": ("E", "", "t", "L"),
}
# How that source unrolls parentheses: xy(ab|cd|ef)*2,pq, (ab)*3, ab,(cd|)*2 and (|ab)*2,cd, in its letters.
UNROLLED = {
    "Et(tt|t|tt)*2,tL": ("Ettt", "t", "tttt", "t", "tttL"),
    "E(tt)*3L": ("EttttttL",),
    "Et,(tt|)*2L": ("Ettt", "tt", "L"),
    "E(|tt)*2,L": ("E", "tt", "ttL"),
    "E|*3(t*2|)*2mL": ("E", "", "", "tt", "tt", "mL"),
}


@pytest.mark.parametrize(("text", "stages"), [*DOCUMENTED.items(), *UNROLLED.items()])
def test_what_megatron_documents(text, stages):
    assert parse_layout(text) == stages
    assert parse_layout(format_layout(stages)) == stages
    if text in DOCUMENTED:
        assert len(format_layout(stages)) <= len(text)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, ...]:
    """Stages that repeat, as planned ones do, or do not."""
    units = st.lists(st.integers(0, 4), min_size=1, max_size=3)
    counts: list[int] = []
    for unit in draw(st.lists(units, min_size=1, max_size=5)):
        counts += unit * draw(st.integers(1, 6))
    stages = ["t" * count for count in counts] + [""] * draw(st.integers(0, 1))
    stages[0] = f"E{stages[0]}"
    stages[-1] += "m" * draw(st.integers(0, 4)) + "L"
    return tuple(stages)


@given(layouts())
def test_what_is_written_is_read_again_and_is_compact(stages):
    text = format_layout(stages)
    assert parse_layout(text) == stages
    assert len(text) <= len("|".join(stages))
    repeated = ("E", *["tt"] * 2 * len(stages), "L")
    assert len(format_layout(repeated)) <= len("E|(tt|)*00L") + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et|x|L", r"cannot be read from 'x\|L' on: write E, t, m and L"),
        ("Et |L", r"cannot be read from ' \|L' on"),
        ("E(t(t)*2)*2L", r"cannot be read from '\(t\(t\)\*2\)\*2L' on: .* without parentheses inside"),
        ("E(tt)L", r"cannot be read from '\(tt\)L' on"),
        ("Et*L", r"cannot be read from '\*L' on"),
        ("Et3L", r"cannot be read from '3L' on"),
        ("tt|L", r"must hold one E, then every t, then every m, and one L last, got 'ttL'"),
        ("Em|tL", "must hold one E"),
        ("Et|L|L", "must hold one E"),
        ("", "must hold one E"),
        (f"Et*{'9' * 5000}L", "stands for more than 100000 layers and stages"),
        ("E(t*99999|)*3L", "stands for more than 100000 layers and stages"),
    ],
)
def test_what_megatron_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layout(text)


def test_layers_in_another_order_are_not_written():
    with pytest.raises(ConfigError, match="a layout must hold one E"):
        format_layout(["E", "t", "Lt"])
