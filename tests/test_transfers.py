"""Transfers: as many as `lower` writes, and as many bytes."""

from hypothesis import given, settings

from evenflow.ir import Costs, Exchange, Flow, Payload, Send
from evenflow.lower import lower
from evenflow.schedules.catalog import get
from evenflow.transfers import Transfers, count_transfers
from random_pipelines import Pipeline, pipelines


@settings(derandomize=True, deadline=None)
@given(pipelines())
def test_it_counts_what_lower_writes(pipeline: Pipeline) -> None:
    program = lower(pipeline.schedule, pipeline.flow, pipeline.costs)
    ops = [op for queue in program.ranks for op in queue]
    ops += [transfer for op in ops if isinstance(op, Exchange) for transfer in op.transfers]
    sends = [op for op in ops if isinstance(op, Send)]
    counted = count_transfers(pipeline.schedule, pipeline.flow, pipeline.costs)
    assert counted.num_activations == sum(send.payload is Payload.ACTIVATION for send in sends)
    assert counted.num_gradients == sum(send.payload is Payload.GRADIENT for send in sends)
    assert counted.num == len(sends)
    if pipeline.costs.sent_bytes:
        sizes = [pipeline.costs.sent_bytes[send.source, send.target] for send in sends]
        assert abs(counted.num_bytes - sum(sizes)) <= 1e-9 * sum(sizes)


def test_bytes_are_unknown_where_no_cost_gives_any() -> None:
    schedule = get("gpipe")(2, 1, 3)
    assert count_transfers(schedule, Flow.chain(2), Costs.uniform(2)) == Transfers(3, 3, None)


def test_an_evaluation_sends_no_gradients() -> None:
    schedule = get("forward-only")(3, 2, 4)
    assert count_transfers(schedule, Flow.chain(6), Costs.uniform(6)) == Transfers(20, 0, None)


def test_stages_of_one_rank_need_none() -> None:
    assert count_transfers(get("gpipe")(1, 3, 4), Flow.chain(3), Costs.uniform(3)).num == 0
