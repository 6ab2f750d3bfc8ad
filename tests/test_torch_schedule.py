"""Torch's schedule files: its own parser and checks take them, its runtime computes the same gradients."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from torch.distributed.pipelining import schedules as torchs

from evenflow.errors import ConfigError, ScheduleError
from evenflow.ir import Backward, Forward, Placement, Schedule
from evenflow.ir.costs import Costs
from evenflow.schedule_file import parse_schedule
from evenflow.schedules import catalog
from evenflow.schedules.auto import best
from evenflow.torch_schedule import format_torch_schedule, torch_faults
from forked import run_ranks
from random_pipelines import Pipeline, pipelines
from torch_runtime import run_in_torch, unsplit_gradients

TRAINING = [name for name in catalog.SCHEDULES if name != "forward-only"]


def made(name: str, num_ranks: int, number: int) -> Schedule:
    return catalog.get(name)(num_ranks, catalog.default_stages_per_rank(name), number)


def searched(num_ranks: int, number: int) -> Schedule:
    """What the search finds where backwards take long and ranks hold few microbatches."""

    def costs_on(placement: Placement) -> Costs:
        parts = ((1.0,) * num_ranks, (1.5,) * num_ranks, (0.5,) * num_ranks)
        return Costs.of_ranks(placement, *parts, memory_caps=(num_ranks + 1.0,) * num_ranks)

    return best(num_ranks, 2, number, costs_on, time_budget_seconds=1.0, seed=0).schedule


def read_by_torch(text: str) -> dict[int, list]:
    rows = text.splitlines()
    return {rank: [torchs._Action.from_str(cell) for cell in row.split(",")] for rank, row in enumerate(rows)}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(("num_ranks", "number"), [(2, 4), (4, 8), (3, 7)])
def test_torch_takes_every_method_and_places_its_transfers(name, num_ranks, number):
    schedule = made(name, num_ranks, number)
    num_stages = schedule.placement.num_stages
    actions = read_by_torch(format_torch_schedule(schedule))
    ranks = torchs._validate_schedule(actions, num_ranks, num_stages, number)
    assert tuple(ranks[stage] for stage in range(num_stages)) == schedule.placement.rank_of
    assert [len(queue) for queue in actions.values()] == [len(queue) for queue in schedule.ranks]
    lowered = {
        rank: torchs._add_reduce_grad(torchs._add_unshard_reshard(queue), number)
        for rank, queue in actions.items()
    }
    with_transfers = torchs._add_send_recv(lowered, ranks.__getitem__, num_stages)
    sent = sum("SEND" in str(action) for queue in with_transfers.values() for action in queue)
    crossed = sum(one != other for one, other in itertools.pairwise(schedule.placement.rank_of))
    assert sent == 2 * crossed * number


@given(pipelines())
def test_what_is_written_for_torch_is_read_again(pipeline: Pipeline) -> None:
    schedule = pipeline.schedule
    try:
        assume(not torch_faults(schedule))
    except ScheduleError:
        return  # its overlaps suit the random flow, and wait for one another on a chain
    text = format_torch_schedule(schedule)
    read = parse_schedule(text, name=schedule.name)
    assert (read.placement, read.num_microbatches) == (schedule.placement, schedule.num_microbatches)
    assert [len(queue) for queue in read.ranks] == [len(queue) for queue in schedule.ranks]
    assert format_torch_schedule(read) == text


def test_what_torch_writes_is_read():
    text = "0F0,0F1,(0F2;0B0)OVERLAP_F_B,,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1I2,1W2\n"
    read = parse_schedule(text, name="torch's")
    assert [str(op) for op in read.ranks[0]] == ["0F0", "0F1", "0F2&0B0", "0B1", "0B2"]
    written = [str(action) for action in read_by_torch(format_torch_schedule(read))[0]]
    assert written == ["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"]


@pytest.mark.parametrize("cell", ["0SEND_F0", "1RECV_B0", "0UNSHARD", "0RESHARD", "0REDUCE_GRAD"])
def test_communication_of_torch_is_refused_by_its_place(cell):
    message = f"line 2, column 3: '{cell}' is communication of torch's, and Evenflow places its own"
    with pytest.raises(ConfigError, match=message):
        parse_schedule(f"0F0,0B0\n1F0,1B0,{cell}", name="torch's")


@pytest.mark.parametrize("cell", ["(0F0;0B0)", "(0F0)OVERLAP_F_B", "(0F0;0SEND_F0)OVERLAP_F_B"])
def test_half_an_overlap_is_refused(cell):
    with pytest.raises(ConfigError, match=r"line 1, column 1: .* is not a compute op"):
        parse_schedule(cell, name="torch's")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0F1\n1F0,1F1", r"it has no backward: torch evaluates without a schedule file"),
        (
            "0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0",
            r"in the order of microbatches, by which torch finds their losses, and 1F1 comes before 1F0",
        ),
        ("0F0,1F0,1B0,0B0\n2F0,2B0", r"3 stages are on 2 ranks"),
        ("0F0&0F1,0B0,0B1", r"0F0&0F1: torch fuses a forward with a backward"),
    ],
)
def test_what_torch_cannot_run_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=message) as raised:
        format_torch_schedule(parse_schedule(text, name="mine"))
    assert "schedule 'mine' cannot be run by torch.distributed.pipelining" in str(raised.value)


def test_what_nothing_can_run_is_refused():
    queues = ((Backward(0, 0), Forward(0, 0)),)
    with pytest.raises(ScheduleError):
        format_torch_schedule(Schedule("mine", Placement.linear(1), 1, queues))


def test_torch_reads_a_fused_cell_of_ours_as_half_of_it():
    """Why the file is written in torch's own words."""
    assert str(torchs._Action.from_str("2F3&5B1")) == "2F3"


CASES = {
    **{
        name: functools.partial(made, name, 2, 4)
        for name in ("gpipe", "1f1b", "interleaved-1f1b", "looped-bfs", "zb-h1", "zb-v", "dualpipe-v")
    },
    "auto": functools.partial(searched, 2, 4),
}
REFUSED = "0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0\n"


def compare_in_torch(schedules: dict[str, Schedule], texts: dict[str, str], folder: Path) -> set[str]:
    """Run schedule files in torch, each rank a process; return those with the unsplit model's gradients."""
    cases = []
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
        cases.append((name, schedules[name].placement.rank_of, schedules[name].num_microbatches))
    num_ranks = next(iter(schedules.values())).placement.num_ranks
    ended = run_ranks(run_in_torch, folder, cases, num_ranks=num_ranks, within_seconds=100)
    assert [each.exit_code for each in ended] == [0] * num_ranks, ended
    equal = set()
    for name, rank_of, number in cases:
        found = {}
        for rank in range(num_ranks):
            found |= torch.load(folder / f"{name}{rank}.pt", weights_only=True)
        expected = unsplit_gradients(len(rank_of), number)
        assert found.keys() == expected.keys()
        # Bit for bit: torch adds in the order of microbatches too, and a power of two divides exactly.
        if all(torch.equal(found[each], tensor) for each, tensor in expected.items()):
            equal.add(name)
    return equal


def test_torch_computes_the_gradients_of_the_unsplit_model_but_where_it_is_refused(tmp_path: Path):
    schedules = {name: case() for name, case in CASES.items()}
    texts = {name: format_torch_schedule(schedule) for name, schedule in schedules.items()}
    refused = parse_schedule(REFUSED, name="refused")
    assert "in the order of microbatches" in torch_faults(refused)[0]
    schedules["refused"], texts["refused"] = refused, REFUSED
    assert compare_in_torch(schedules, texts, tmp_path) == set(CASES)


def test_torch_computes_them_on_four_ranks(tmp_path: Path):
    schedule = made("zb-v", 4, 8)
    assert compare_in_torch({"v": schedule}, {"v": format_torch_schedule(schedule)}, tmp_path) == {"v"}
