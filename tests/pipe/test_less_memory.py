"""Recomputation and offload take as much off each rank's peak as the plan said, and change no bit."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import distributed as dist

import evenflow
from evenflow.errors import ConfigError
from evenflow.launcher import launch
from evenflow.pipe import build
from evenflow.pipe.choices import world_of
from evenflow.pipe.default_programs import model_loss
from evenflow.pipe.measured import Run, measured_request
from evenflow.plan.fit import at_cuts, groups_of
from evenflow.plan.plan import positions_in
from evenflow.plan.planner import plan
from evenflow.plan.price import chain_for
from evenflow.plan.request import Levers
from evenflow.runtime.offload import Offload
from small_models import MODELS, TIED, assert_same_bits, load_example, train
from unsplit import mean_square, mlp, regression

RANKS, LENGTH, SIZE = 2, 128, 8
SCHEDULES = ("1f1b", "zb-h1")
WITHIN = 0.1


def gpt():
    torch.manual_seed(0)
    example = load_example("gpt")
    config = example.GPTConfig(
        vocabulary_size=256, max_length=LENGTH, num_layers=5, width=128, num_heads=4, dropout=0.1
    )
    return example.GPT(config).train()


def adamw(named):
    return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3, foreach=False)


def batch():
    ids = torch.randint(0, 256, (4 * SIZE, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def run(made, world, **options):
    """Two steps' losses, and what the ranks held at most in the second."""
    pipe = evenflow.pipeline(
        gpt(), example=batch(), optimizer=adamw, plan=made, device="cpu", seed=3, **options
    )
    first = pipe.step(batch()).loss
    second, peak = pipe.meter.peak_bytes(lambda: pipe.step(batch()))
    pipe.close()
    return [float(first), float(second.loss)], world.gather(peak)


def on_two_ranks(schedule):
    """By what was done to hold less: losses, what was promised of each rank, and what it held."""
    torch.set_num_threads(1)
    world = world_of("cpu")
    levers = Levers(pipeline=RANKS, stages_per_rank=1, schedule=schedule, microbatch_size=SIZE)
    asked = measured_request(
        Run(gpt(), model_loss, batch(), adamw, levers=levers.pipeline_only()), world, torch.device("cpu")
    )
    found = {}
    for how in ("none", "full", "selective"):
        within = dataclasses.replace(asked, levers=dataclasses.replace(asked.levers, recompute=how))
        if how == "selective":
            room = 0.7 * max(found["none"][1]) + asked.cluster.devices[0].reserved_bytes
            within = within.with_memory(room)
        made = world.share(plan(within, search_seconds=0.0), 0)
        found[how] = *run(made, world), [rank.memory.allocated for rank in made.ranks], made
        losses, held, promised, _ = found[how]
        found[how] = losses, promised, held, made
    made = found["none"][3]
    choice = made.choice
    chain = chain_for(asked, choice)
    fit = at_cuts(
        *(asked, choice, chain, positions_in(made, chain.names), groups_of(asked.cluster, made.degrees)),
        offloads=True,
    )
    losses, held = run(made, world, offload="activations")
    found["offload"] = losses, [memory.allocated for memory in fit.memory], held, made
    return found if dist.get_rank() == 0 else None


@cache
def results(schedule):
    return launch(on_two_ranks, schedule, nproc=RANKS)[0]


@pytest.mark.parametrize("how", ["full", "selective", "offload"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peaks_are_those_of_the_plan(schedule, how):
    losses, promised, held, made = results(schedule)[how]
    plain = results(schedule)["none"]
    assert losses == plain[0]
    assert promised == pytest.approx(held, rel=WITHIN)
    assert any(stage.recompute for stage in made.stages) == (how != "offload")
    if how == "selective":  # is cut elsewhere, for less room
        assert max(held) < 0.9 * max(plain[2])
        return
    drops = [
        [before - now for before, now in zip(plain[n], own, strict=True)]
        for n, own in ((1, promised), (2, held))
    ]
    largest = max(drops[1])
    assert largest > 0.3 * max(plain[2])
    assert drops[0] == pytest.approx(drops[1], rel=WITHIN, abs=0.05 * largest)


# -- offload


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved-zb"])
@pytest.mark.parametrize("name", MODELS)
def test_offload_changes_no_bit(monkeypatch, name, schedule, recompute):
    made = []

    def offload(device):
        made.append(Offload(device, least_bytes=1))
        return made[-1]

    monkeypatch.setattr(build, "Offload", offload)
    stages = 4 if schedule == "interleaved-zb" else 2
    options = {"dropout": 0.1, "exact": name in TIED, "stages": stages, "schedule": schedule}
    found = train(name, recompute=recompute, offload="activations", **options)
    assert len(made) == stages
    assert all(any(each._free.values()) for each in made), "buffers were used"
    assert_same_bits(found, train(name, **options))


@pytest.mark.parametrize(
    ("offload", "text"),
    [("optimizer", "offload='optimizer' is not 'activations': of optimizers"), (True, "offload=True is not")],
)
def test_another_offload_is_refused(offload, text):
    with pytest.raises(ConfigError, match=text):
        evenflow.pipeline(mlp(4, 1), loss=mean_square, example=regression(), offload=offload)
