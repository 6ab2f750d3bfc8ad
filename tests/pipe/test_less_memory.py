"""Recomputation and offload take as much off each rank's peak as the plan said, and change no bit."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import distributed as dist

import evenflow
from evenflow.errors import ConfigError
from evenflow.pipe.building import making
from evenflow.pipe.building.measured import Run, measured_request
from evenflow.pipe.given.default_programs import model_loss
from evenflow.pipe.given.places import world_of
from evenflow.plan.plan import Plan, positions_in
from evenflow.plan.planner import plan
from evenflow.plan.request import Levers
from evenflow.plan.search.fit import at_cuts, groups_of
from evenflow.plan.search.price import chain_for
from evenflow.runtime.program.offload import Offload
from small_models import MODELS, TIED, assert_same_bits, load_example, reference, train
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


@dataclasses.dataclass(frozen=True)
class Held:
    """A plan that was run: two steps' losses, what each rank held at most, and what was promised of it."""

    plan: Plan
    losses: list[float]
    held: list[int]
    promised: list[float]


def run(made, world, **options):
    """Two steps' losses, and what the ranks held at most in the second."""
    pipe = evenflow.pipeline(
        gpt(), example=batch(), optimizer=adamw, plan=made, device="cpu", seed=3, **options
    )
    first = pipe.step(batch()).loss
    second, peak = pipe.meter.peak_bytes(lambda: pipe.step(batch()))
    pipe.close()
    return [float(first), float(second.loss)], world.gather(peak)


def on_two_ranks():
    """What came of each schedule, by what was done to hold less."""
    torch.set_num_threads(1)
    world = world_of("cpu")
    levers = Levers(pipeline=RANKS, stages_per_rank=1, microbatch_size=SIZE).pipeline_only()
    measured = measured_request(
        Run(gpt(), model_loss, batch(), adamw, levers=levers), world, torch.device("cpu")
    )
    found: dict[tuple[str, str], Held] = {}
    for schedule in SCHEDULES:
        asked = dataclasses.replace(measured, levers=dataclasses.replace(levers, schedule=schedule))
        for how in ("none", "full", "selective"):
            within = dataclasses.replace(asked, levers=dataclasses.replace(asked.levers, recompute=how))
            if how == "selective":
                room = 0.7 * max(found[schedule, "none"].held) + asked.cluster.devices[0].reserved_bytes
                within = within.with_memory(room)
            made = world.share(plan(within, search_seconds=0.0), 0)
            promised = [rank.memory.allocated for rank in made.ranks]
            found[schedule, how] = Held(made, *run(made, world), promised)
        plain = found[schedule, "none"]
        choice = plain.plan.choice
        chain = chain_for(asked, choice)
        cuts, groups = positions_in(plain.plan, chain.names), groups_of(asked.cluster, plain.plan.degrees)
        fit = at_cuts(asked, choice, chain, cuts, groups, offloads=True)
        offloaded = run(plain.plan, world, offload="activations")
        promised = [memory.allocated for memory in fit.memory]
        found[schedule, "offload"] = Held(plain.plan, *offloaded, promised)
    return found if dist.get_rank() == 0 else None


@cache
def results():
    return evenflow.launch(on_two_ranks, nproc=RANKS)[0]


@pytest.mark.parametrize("how", ["full", "selective", "offload"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peaks_are_those_of_the_plan(schedule, how):
    plain, found = results()[schedule, "none"], results()[schedule, how]
    assert found.losses == plain.losses
    assert found.promised == pytest.approx(found.held, rel=WITHIN)
    assert any(stage.recompute for stage in found.plan.stages) == (how != "offload")
    if how == "selective":  # is cut elsewhere, for less room
        assert max(found.held) < 0.9 * max(plain.held)
        return
    promised, held = (
        [before - now for before, now in zip(getattr(plain, name), getattr(found, name), strict=True)]
        for name in ("promised", "held")
    )
    assert max(held) > 0.3 * max(plain.held)
    assert promised == pytest.approx(held, rel=WITHIN, abs=0.05 * max(held))


# -- offload


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [("1f1b", None), ("zb-h1", None), ("zb-h1", "full"), ("interleaved-zb", "full")],
)
@pytest.mark.parametrize("name", MODELS)
def test_offload_changes_no_bit(monkeypatch, name, schedule, recompute):
    made = []

    def offload(device):
        made.append(Offload(device, least_bytes=1))
        return made[-1]

    monkeypatch.setattr(making, "Offload", offload)
    stages = 4 if schedule == "interleaved-zb" else 2
    options = {"dropout": 0.1, "exact": name in TIED, "stages": stages, "schedule": schedule}
    found = train(name, recompute=recompute, offload="activations", **options)
    assert len(made) == stages
    assert all(any(each._free.values()) for each in made), "buffers were used"
    assert_same_bits(found, reference(name))


@pytest.mark.parametrize(
    ("offload", "text"),
    [("optimizer", "offload='optimizer' is not 'activations': of optimizers"), (True, "offload=True is not")],
)
def test_another_offload_is_refused(offload, text):
    with pytest.raises(ConfigError, match=text):
        evenflow.pipeline(mlp(4, 1), loss=mean_square, example=regression(), offload=offload)
