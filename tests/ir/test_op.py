"""The text form of ops is one to one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenflow.errors import ConfigError
from evenflow.ir import (
    Backward,
    Exchange,
    Forward,
    Handoff,
    InputGrad,
    Op,
    Overlap,
    Payload,
    Recv,
    ReduceGrads,
    Send,
    Unshard,
    WeightGrad,
    parse_op,
)

numbers = st.integers(0, 10**18 - 1)
transfer = (numbers, numbers, numbers, st.sampled_from(Payload))
simple = st.one_of(
    *(st.builds(kind, numbers, numbers) for kind in (Forward, Backward, InputGrad, WeightGrad))
)
pair = st.one_of(st.builds(Send, *transfer), st.builds(Recv, *transfer))
ops = st.one_of(
    simple,
    st.builds(Overlap, simple, simple),
    pair,
    st.builds(Handoff, *transfer),
    st.builds(Exchange, st.lists(pair, min_size=2, max_size=4).map(tuple)),
    st.builds(ReduceGrads, numbers),
    st.builds(Unshard, numbers),
)


@pytest.mark.parametrize(
    ("text", "op"),
    [
        ("2F0", Forward(2, 0)),
        ("2B10", Backward(2, 10)),
        ("S0>1F3", Send(0, 1, 3, Payload.ACTIVATION)),
        ("R1>0B3", Recv(1, 0, 3, Payload.GRADIENT)),
        ("2I10", InputGrad(2, 10)),
        ("2W10", WeightGrad(2, 10)),
        ("2F3&5B1", Overlap(Forward(2, 3), Backward(5, 1))),
        (
            "S0>1F3&R1>0B1",
            Exchange((Send(0, 1, 3, Payload.ACTIVATION), Recv(1, 0, 1, Payload.GRADIENT))),
        ),
        ("G2", ReduceGrads(2)),
        ("U2", Unshard(2)),
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
@given(st.from_regex(r"[SRHGU]?[0-9]{1,2}>?[FBIW]?[0-9]?[FB]?[0-9]{1,2}(&[0-9]F[0-9])?", fullmatch=True))
def test_each_op_has_one_spelling(text: str) -> None:
    try:
        op = parse_op(text)
    except ConfigError:
        return
    assert str(op) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "F0", "2F", "2X0", "-1F0", "02F0", "2F0 ", "2F0\\n", "S0F1", "S0>1F", "٢F0"),
        *(
            "2F0&",
            "2F0&3B1&1F2",
            "2F0&S0>1F0",
            "G2&G3",
            "H0>1F0&H0>1F1",
            "2F0,3B1",
            "S0>1I0",
            "G02",
            "1" + "0" * 18 + "F0",
        ),
    ],
)
def test_other_text_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="stage, one of F, B, I and W, microbatch") as caught:
        parse_op(text)
    assert repr(text) in str(caught.value)
