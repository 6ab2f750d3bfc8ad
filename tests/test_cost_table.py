"""Tables of measured costs: what they mean for a placement, and what is wrong with them."""

from pathlib import Path

import pytest

from evenflow.cost_table import (
    LayerTimes,
    RankTimes,
    capped,
    chain_of,
    price,
    rank_activations,
    read_cost_table,
    write_layers,
)
from evenflow.errors import ConfigError
from evenflow.ir import Costs, Placement
from evenflow.plan.chain import Held


def read(folder: Path, text: str) -> RankTimes | LayerTimes:
    path = folder / "times.csv"
    path.write_text(text)
    return read_cost_table(path)


def test_a_table_of_ranks(tmp_path: Path) -> None:
    text = (
        "\ufeff# measured on Monday\n"
        "rank, Forward_ms ,input_grad_us,weight_grad,activation_gib,weight_activation_gib,cap_gib\n"
        "0,500,250000,0.125,2,1,8,,\n"
        ",,,,,,\n"
        "1,1000,500000,0.25,4,4,8\n"
    )
    assert read(tmp_path, text) == RankTimes(
        (0.5, 1.0),
        (0.25, 0.5),
        (0.125, 0.25),
        activation=(2 * 2.0**30, 4 * 2.0**30),
        weight_activation=(2.0**30, 4 * 2.0**30),
        caps=(8 * 2.0**30, 8 * 2.0**30),
        in_bytes=True,
    )


def test_a_table_of_layers_in_any_order_of_columns(tmp_path: Path) -> None:
    text = "layer,weight_grad_seconds,output,activation,forward_s,input_grad\nembedding,3,6,5,1,2\n"
    assert read(tmp_path, text) == LayerTimes(
        (1.0,), (2.0,), (3.0,), activation=(5.0,), output=(6.0,), in_bytes=False
    )


def test_ranks_share_their_times_among_their_stages() -> None:
    table = RankTimes((2.0, 4.0), (2.0, 6.0), (1.0, 2.0), activation=(8.0, 4.0), caps=(16.0, 6.0))
    costs = price(table, Placement.v_shape(2), latency_seconds=0.25)
    assert costs.forward_seconds == (1.0, 2.0, 2.0, 1.0)
    assert costs.weight_grad_seconds == (0.5, 1.0, 1.0, 0.5)
    assert costs.activation_bytes == costs.weight_grad_bytes == (4.0, 2.0, 2.0, 4.0)
    assert costs.memory_caps == (16.0, 6.0)
    assert costs.link.latency_seconds == 0.25


def test_layers_are_cut_so_that_the_slowest_stage_is_fast() -> None:
    table = LayerTimes(
        (1.0, 1.0, 1.0, 3.0),
        (1.0, 1.0, 1.0, 3.0),
        (0.5, 0.5, 0.5, 0.0),
        activation=(1.0, 2.0, 4.0, 8.0),
        weight_activation=(1.0, 1.0, 1.0, 0.0),
        output=(5.0, 6.0, 7.0, 0.0),
    )
    costs = price(table, Placement.linear(2))
    assert costs.forward_seconds == (3.0, 3.0)
    assert costs.weight_grad_seconds == (1.5, 0.0)
    assert (costs.activation_bytes, costs.weight_grad_bytes) == ((7.0, 8.0), (3.0, 0.0))
    assert costs.sent_bytes == {(0, 1): 7.0, (1, 0): 7.0}
    assert costs.memory_caps is None


def test_without_sizes_a_microbatch_is_one_on_each_rank() -> None:
    table = LayerTimes((1.0,) * 6, (1.0,) * 6, (1.0,) * 6)
    costs = price(table, Placement.v_shape(3))
    assert rank_activations(costs, Placement.v_shape(3)) == (1.0, 1.0, 1.0)
    assert capped(costs, Placement.v_shape(3), 2.5).memory_caps == (2.5, 2.5, 2.5)
    assert costs.sent_bytes == {}


def test_a_cap_counts_microbatches_of_the_rank() -> None:
    costs = Costs((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, activation_bytes=(4.0, 6.0))
    assert capped(costs, Placement.linear(2), 1.5).memory_caps == (6.0, 9.0)


def test_another_number_of_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="the costs name 1 ranks, and there are 2: give each rank one"):
        price(RankTimes((1.0,), (1.0,), (1.0,)), Placement.linear(2))


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="the costs name 1 layers, and 2 stages need at least as many"):
        price(LayerTimes((1.0,), (1.0,), (1.0,)), Placement.linear(2))


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["are empty: begin with the header 'rank,forward,input_grad,weight_grad'"]),
        (
            "0,1,1,1\n",
            [
                (
                    "line 1: the first column is '0': write the header "
                    "'rank,forward,input_grad,weight_grad', or 'layer"
                )
            ],
        ),
        (
            "rank,forward,input_grad,weight_grad\n",
            ["there is no line below the header: write one for each rank"],
        ),
        ("rank,forward,weight_grad\n0,1,1\n", ["line 1: there is no column input_grad"]),
        (
            "rank,forward,forward_ms,input_grad,weight_grad\n0,1,1,1,1\n",
            ["line 1: two columns say forward"],
        ),
        (
            "rank,forwrd,input_grad_mib,weight_grad,output\n0,1,1,1,1\n",
            [
                (
                    "line 1: 'forwrd' is no column; did you mean 'forward'? There are: forward, input_grad, "
                    "weight_grad, activation, weight_activation, cap"
                ),
                "line 1: 'input_grad_mib' is no column; did you mean 'input_grad'?",
                "line 1: 'output' is no column; There are: forward",
            ],
        ),
        (
            "layer,forward_ms,input_grad,weight_grad\na,x,-1,nan\nb,1,inf,\nc,1\nd,1,1,1,1\n",
            [
                "line 2, column forward_ms: 'x': write a finite number of at least 0 (and at most 1e+90)",
                "line 2, column input_grad: '-1': write a finite number of at least 0 (and at most 1e+90)",
                "line 2, column weight_grad: 'nan': write a finite number of at least 0 (and at most 1e+90)",
                "line 3, column input_grad: 'inf': write a finite number of at least 0 (and at most 1e+90)",
                "line 3, column weight_grad: '': write a finite number of at least 0 (and at most 1e+90)",
                "line 4: 2 cells under 4 headings",
                "line 5: 5 cells under 4 headings",
            ],
        ),
        (
            "rank,forward,input_grad,weight_grad\n0,1,1,1\n2,1,1,1\n",
            ["line 3, column rank: '2' where rank 1 is due"],
        ),
        (
            "rank,forward,input_grad,weight_grad,weight_activation,cap_mib\n0,1,1,1,1,1\n",
            [
                "line 1: give a unit to all columns of memory, or to none",
                "line 1: weight_activation means nothing without a column activation",
                "line 1: cap means nothing without a column activation",
            ],
        ),
        (
            "layer,forward,input_grad,weight_grad,activation,weight_activation\na,1,1,1,2,3\n",
            ["line 2, column weight_activation: more is kept (3) than is held (2)"],
        ),
    ],
)
def test_all_faults_are_told_with_their_places(tmp_path: Path, text: str, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    message = str(raised.value)
    assert str(tmp_path / "times.csv") in message
    for fault in faults:
        assert fault in message
    assert message.count("\n  - ") in {0, len(faults)}


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the costs .*none.csv: No such file or directory"):
        read_cost_table(tmp_path / "none.csv")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read_cost_table(tmp_path / "x.csv")


def test_layers_make_a_chain(tmp_path: Path) -> None:
    text = (
        "layer,forward_ms,input_grad_ms,weight_grad_ms,activation_kib,weight_activation_kib,output_kib\n"
        "embedding,500,0,250,4,2,8\nblock,1000,1000,500,0,0,8\nhead,2000,2000,1000,16,16,1\n"
    )
    table = read(tmp_path, text)
    assert isinstance(table, LayerTimes)
    chain = chain_of(table, "H100")
    assert chain.seconds["H100"].total == (0.75, 2.5, 5.0)
    assert chain.saved == (Held(4096.0, (0,)), Held(16384.0, (2,)))
    assert chain.kept == (Held(2048.0, (0,)), Held(16384.0, (2,)))
    assert chain.cut_bytes == (0.0, 8192.0, 8192.0)
    assert chain.legal == (True,) * 3


def test_layers_of_times_alone_make_a_chain_without_memory(tmp_path: Path) -> None:
    table = read(tmp_path, "layer,forward,input_grad,weight_grad\na,1,1,1\nb,2,2,2\n")
    assert isinstance(table, LayerTimes)
    chain = chain_of(table, "H100")
    assert (chain.saved, chain.cut_bytes) == ((), (0.0, 0.0))


def test_a_table_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the costs .*: Is a directory"):
        write_layers(tmp_path, ["a"], LayerTimes((1.0,), (1.0,), (1.0,)))


def test_memory_without_a_unit_makes_no_chain(tmp_path: Path) -> None:
    table = read(tmp_path, "layer,forward,input_grad,weight_grad,activation\na,1,1,1,5\n")
    assert isinstance(table, LayerTimes)
    with pytest.raises(ConfigError, match="has no unit"):
        chain_of(table, "H100")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"rank,forward,input_grad,weight_grad\n0,{'1' * 200_000},1,1", "are no CSV: field larger than"),
        ("rank,forward,input_grad,weight_grad\n0,1e308,1,1", "'1e308': write a finite number of at least 0"),
        ("x" * 100_000, "line 1: the first column is 'xxxx"),
        ("layer,forward,input_grad,weight_grad\n" + "a,x,1,1\n" * 1000, "and 980 more"),
    ],
)
def test_what_somebody_else_may_have_written_is_refused_in_a_few_lines(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "costs.csv").write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_cost_table(tmp_path / "costs.csv")
    assert len(str(refused.value)) < 5000
