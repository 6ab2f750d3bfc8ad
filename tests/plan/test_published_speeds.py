"""Planning runs that were published, with their degrees, gives the speeds that were published."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evenflow
from evenflow.cluster.short import parse_cluster
from evenflow.cost.estimate import estimate
from evenflow.graph.kernels.fakes import FakeParameters
from evenflow.graph.leaves.leaves import flatten
from evenflow.graph.recording.record import record
from evenflow.plan.planner import plan
from evenflow.plan.rank_memory import TrainingState
from evenflow.plan.request import Levers, Request

# Shapes of the models: width, MLP, layers, heads, heads of keys, vocabulary.
LLAMA_2_13B = (5120, 13824, 40, 40, 40, 32_000)
LLAMA_3_8B = (4096, 14336, 32, 32, 8, 128_256)
LLAMA_3_70B = (8192, 28672, 80, 64, 8, 128_256)
# Recomputing by operation, in the table of Llama 2 13B: 2,162 tokens a second without, 1,904 with.
BY_OPERATION = 2162 / 1904


def chain_of(sizes, rows, length, devices):
    width, inner, layers, heads, keys, vocabulary = sizes
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        use_cache=False,
    )
    with evenflow.deferred_init():
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.zeros(rows, length, dtype=torch.long)
    fakes = FakeParameters(model, torch.device("cpu"))
    batch = {"input_ids": ids, "labels": ids}
    tree = record(
        lambda model, batch: model(**batch).loss, model, batch, device=torch.device("cpu"), fakes=fakes
    )
    return estimate(flatten(tree, max_share=1 / 16), model, devices, num_rows=rows)


@pytest.mark.parametrize(
    ("cluster", "sizes", "rows", "length", "recompute", "tokens_per_second"),
    [
        ("8x8xA100", LLAMA_2_13B, 2, 4096, "none", 2162),
        ("8x8xA100", LLAMA_3_70B, 1, 8192, "full", 331),
        ("8x8xA100", LLAMA_3_8B, 1, 8192, "none", 2973 * BY_OPERATION),
        ("8xH100", LLAMA_3_8B, 2, 8192, "none", 6667 * BY_OPERATION),
    ],
)
def test_torchtitan_s_sharded_runs(cluster, sizes, rows, length, recompute, tokens_per_second):
    machine = parse_cluster(cluster).with_memory(2.0**38)  # memory is not what is asked about
    chain = chain_of(sizes, rows, length, machine.devices)
    levers = Levers(pipeline=1, tensor=1, sharding="fsdp", microbatch_size=rows, recompute=recompute)
    asked = Request(
        lambda _: chain,
        (rows,),
        machine,
        rows * machine.num_ranks,
        length,
        1 / 16,
        TrainingState(12.0, 4.0, 2.0),
        levers=levers,
    )
    found = plan(asked)
    assert found.degrees.data == machine.num_ranks
    each = found.prediction.tokens_per_second / machine.num_ranks
    assert each == pytest.approx(tokens_per_second, rel=0.05)
