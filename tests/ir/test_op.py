"""The text form of ops is one to one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.errors import ConfigError
from evenflow.ir import Backward, Forward, Handoff, Op, Payload, Recv, Send, parse_op

numbers = st.integers(0, 10**6)
transfer = (numbers, numbers, numbers, st.sampled_from(Payload))
ops = st.one_of(
    st.builds(Forward, numbers, numbers),
    st.builds(Backward, numbers, numbers),
    st.builds(Send, *transfer),
    st.builds(Recv, *transfer),
    st.builds(Handoff, *transfer),
)


@pytest.mark.parametrize(
    ("text", "op"),
    [
        ("2F0", Forward(2, 0)),
        ("2B10", Backward(2, 10)),
        ("S0>1F3", Send(0, 1, 3, Payload.ACTIVATION)),
        ("R1>0B3", Recv(1, 0, 3, Payload.GRADIENT)),
        ("H0>12F3", Handoff(0, 12, 3, Payload.ACTIVATION)),
    ],
)
def test_text_form(text: str, op: Op) -> None:
    assert str(op) == text
    assert parse_op(text) == op


@settings(derandomize=True)
@given(ops)
def test_parse_is_the_inverse_of_format(op: Op) -> None:
    assert parse_op(str(op)) == op


@settings(derandomize=True)
@given(st.from_regex(r"[SRH]?[0-9]{1,2}>?[FB]?[0-9]?[FB]?[0-9]{1,2}", fullmatch=True))
def test_each_op_has_one_spelling(text: str) -> None:
    try:
        op = parse_op(text)
    except ConfigError:
        return
    assert str(op) == text


@pytest.mark.parametrize(
    "text", ["", "F0", "2F", "2X0", "-1F0", "02F0", "2F0 ", "2F0\n", "S0F1", "S0>1F", "٢F0"]
)
def test_other_text_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="stage, F or B, microbatch") as caught:
        parse_op(text)
    assert repr(text) in str(caught.value)
