"""Files from strangers: damaged at random, each is refused by name or does what an undamaged one does.

EVENFLOW_NUM_FILES says how many plans and schedules (`make torture-files`: 20,000); always the same ones.
"""

import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st
from rich.console import Console

from damage import damaged_bytes, damaged_schedule, damaged_toml, damaged_tree
from evenflow.cli import train
from evenflow.cli.config import TextData
from evenflow.cli.config_file import read_config
from evenflow.cli.main import main
from evenflow.cli.show import print_run
from evenflow.cluster.cluster import MOST_RANKS
from evenflow.cluster.read import read_cluster
from evenflow.cluster.write import format_cluster
from evenflow.cost.cache import Cache, Place
from evenflow.cost_table import price, read_cost_table
from evenflow.errors import ConfigError, EvenflowError, ScheduleError
from evenflow.foreign import visible
from evenflow.ir import Flow, Placement
from evenflow.ir.costs import Costs
from evenflow.journal.chrome_trace import chrome_trace
from evenflow.journal.folder import read_last_step, read_plan_of, read_run, read_steps, write_run
from evenflow.journal.page import run_page
from evenflow.plan.plan_file import read_plan, read_plan_file
from evenflow.schedule_file import parse_schedule
from evenflow.simulate import simulate
from hostile_runs import (
    assert_harmless_plan,
    assert_harmless_schedule,
    assert_is_told_well,
    bounded,
    each_of,
    plan_texts,
    schedule_texts,
)
from small_runs import LAST_STEP, PLAN, RUN, STEPS

NUM_FILES = int(os.environ.get("EVENFLOW_NUM_FILES", "1000"))


def test_of_damaged_plans_none_crashes_hangs_or_trains_wrongly(tmp_path: Path) -> None:
    path, ends = tmp_path / "plan.toml", Counter[str]()

    def check(data: st.DataObject) -> None:
        path.write_bytes(data.draw(damaged_toml(plan_texts())))
        assert_harmless_plan(path, ends)

    each_of(NUM_FILES // 2, check)
    assert all(ends[end] > NUM_FILES / 40 for end in ("not read", "not run", "ran")), ends


def test_of_damaged_schedules_none_crashes_hangs_or_trains_wrongly(tmp_path: Path) -> None:
    path, ends = tmp_path / "schedule.csv", Counter[str]()

    def check(data: st.DataObject) -> None:
        path.write_bytes(data.draw(damaged_schedule(schedule_texts())))
        assert_harmless_schedule(path, ends)

    each_of(NUM_FILES // 2, check)
    assert all(ends[end] > NUM_FILES / 40 for end in ("not read", "not run", "ran")), ends


def test_an_undamaged_file_runs(tmp_path: Path) -> None:
    ends = Counter[str]()
    for text in plan_texts():
        (tmp_path / "plan.toml").write_text(text)
        assert_harmless_plan(tmp_path / "plan.toml", ends)
    assert ends == {"ran": 5, "not run": 2}, "two are of several processes"
    for text in schedule_texts():
        (tmp_path / "schedule.csv").write_text(text)
        assert_harmless_schedule(tmp_path / "schedule.csv", ends)
    assert ends["ran"] == 5 + len(schedule_texts())


# -- other files


def each_is_read_or_told(
    path: Path,
    num_files: int,
    damaged: st.SearchStrategy[bytes],
    use: Callable[[Path], object],
    *,
    told: Path | None = None,
) -> None:
    """Of files so damaged each can be used, or is refused by name (`told`)."""
    ends = Counter[str]()

    def check(data: st.DataObject) -> None:
        path.write_bytes(data.draw(damaged))
        with bounded():
            try:
                use(path)
                ends["used"] += 1
            except EvenflowError as error:
                assert_is_told_well(error, told or path)
                ends["refused"] += 1

    each_of(num_files, check)
    assert all(ends[end] > num_files / 40 for end in ("used", "refused")), ends


CLUSTER = """
hosts = [
  {count = 2, devices = [{kind = "RTX 4090", count = 2}, {kind = "big", memory = "40GiB"}], link = "own"},
  {devices = [{kind = "H100", count = 3}]},
]
network = {link = "25 Gb Ethernet"}
links = {own = {latency_us = 20, gib_per_second = 11.5}}
measured = [{from = 0, to = 1, latency_us = 12, gib_per_second = 20}]

[devices.big]
teraflops = {float32 = 20, bfloat16 = 150}
memory = "48GiB"
memory_gib_per_second = 900
efficiency = 0.6
"""


def test_of_damaged_clusters_none_crashes_or_fills_the_memory(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        cluster = read_cluster(path)
        assert cluster.num_ranks <= MOST_RANKS
        assert all(device.name.isprintable() for host in cluster.hosts for device in host.devices)
        format_cluster(cluster)

    each_is_read_or_told(tmp_path / "cluster.toml", 200, damaged_toml((CLUSTER,)), use)


TABLES = (
    b"rank,forward_ms,input_grad_ms,weight_grad_ms,activation_mib,cap_mib\n0,10.5,11,8.25,3,20\n1,9,10,8,3,20\n",
    b"layer,forward,input_grad,weight_grad,activation,output\nembed,.5,.1,.4,2,1\nblock,3,3,2,2,1\nhead,1,1,1,1,0\n",
)


def test_of_damaged_cost_tables_none_crashes(tmp_path: Path) -> None:
    schedule = parse_schedule(schedule_texts()[0], name="1f1b")

    def use(path: Path) -> None:
        table = read_cost_table(path)
        try:
            found = simulate(schedule, Flow.chain(2), price(table, Placement.linear(2)))
        except EvenflowError as error:
            raise ConfigError(f"{path}: {error}") from error  # of a table that can be read
        assert math.isfinite(found.makespan_seconds)

    damaged = st.sampled_from(TABLES).flatmap(damaged_bytes)
    each_is_read_or_told(tmp_path / "costs.csv", 300, damaged, use)


CONFIG = """
name = "mine"
model = {function = "gpt.py:build", arguments = {width = 32}}
data = {paths = ["text"], batch_size = 16, length = 128, held_out = 0.1}
training = {steps = 500, learning_rate = 1e-3, warmup_steps = 50, seed = 3, clip_norm = 1.0}
pipeline = {stages = 4, stages_per_rank = 2, schedule = "zb-v", microbatch_size = 2, recompute = ["h.0"]}
"""


def test_of_damaged_configurations_none_crashes_or_leads_out_of_the_folder(tmp_path: Path) -> None:
    def use(path: Path) -> None:
        config = read_config(path)
        assert config.name.isprintable()
        assert (Path("runs") / config.name).resolve().parent == Path("runs").resolve()
        assert config.training.seed < 2**63
        if isinstance(config.data, TextData):
            assert config.data.batch_size * config.data.length <= 2**28

    each_is_read_or_told(tmp_path / "run.toml", 300, damaged_toml((CONFIG,)), use)


@pytest.mark.parametrize("name", ["run.json", "steps.jsonl", "last_step.json", "plan.toml"])
def test_of_damaged_runs_none_crashes_or_reaches_the_terminal(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, RUN, STEPS, last_step=LAST_STEP, plan=PLAN, config="")
    whole = (tmp_path / name).read_text()

    def use(path: Path) -> None:
        run = read_run(tmp_path)
        file = io.StringIO()
        steps, last_step, plan = (
            read_steps(tmp_path),
            read_last_step(tmp_path, run),
            read_plan_of(tmp_path, run),
        )
        print_run(Console(file=file), run, steps, plan)
        assert visible(file.getvalue()) == file.getvalue()
        page = run_page(run, steps, last_step, plan)
        assert page.count("<script") == 2  # the data's and the page's own
        chrome_trace(last_step)

    damaged = damaged_bytes(whole.encode())
    if name in ("run.json", "last_step.json"):
        trees = damaged_tree(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
        damaged = st.one_of(damaged, trees)
    elif name == "plan.toml":
        damaged = damaged_toml((whole,))
    each_is_read_or_told(tmp_path / name, 150, damaged, use, told=tmp_path)


# -- what single files have shown

HUGE = "9" * 5000  # more digits than Python converts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"version = {HUGE}", "this is no valid TOML: Exceeds the limit"),
        ("version = 0x" + "f" * 5000, "version = an int too large to be shown"),
        ("a = " + "[" * 9000, "this is no valid TOML: maximum recursion depth"),
        ("a = " + "{a=" * 9000, "this is no valid TOML: maximum recursion depth"),
        ("\n" + "a." * 500_000 + "a = 1", "line 2 has a key of more than 32 parts: 'a.a.a."),
        ("[" + '"a\\"". ' * 100 + "a]", "line 1 has a key of more than 32 parts"),
        ("a = {" + "a . " * 500_000 + "a = 1}", "line 1 has a key of more than 32 parts"),
        ("version = 1\n" + "x" * 1_000_000 + " = 1", "unknown key 'xxxx"),
    ],
)
@pytest.mark.parametrize("read", [read_plan_file, read_config, read_cluster])
def test_toml_that_its_parser_chokes_on(tmp_path, read, text, said):
    (tmp_path / "file.toml").write_text(text)
    with bounded(), pytest.raises(ConfigError) as refused:
        read(tmp_path / "file.toml")
    assert_is_told_well(refused.value, tmp_path / "file.toml")
    if read is read_plan_file:
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\nrank = 1", "\nrank = 2", r"stages\[1\].rank = 2, and ranks are 0 to 1"),
        ("\nrank = 1", "\nrank = 0", "degrees.pipeline = 2 ranks, and the stages are on 1"),
        ("\nrank = 1", f"\nrank = {10**18}", r"stages\[1\].rank = 10+, and ranks are 0 to 1"),
        ("microbatch_size = 2", f"microbatch_size = {2**63}", "must be at most 9223372036854775807"),
        ('schedule = "1f1b"', 'schedule = "1f2b"', "no schedule '1f2b'; did you mean '1f1b'"),
        ("max_leaf_share = 0.0", "max_leaf_share = 7", "max_leaf_share = 7.0 is a share"),
        ("target = 0", "target = 1", r"links\[1\] leads from rank 1 to rank 1: there is one link at most"),
        ("source = 1\ntarget = 0", "source = 0\ntarget = 1", r"links\[1\] leads from rank 0 to rank 1"),
        ("target = 1", f"target = {10**18}", r"links\[0\] leads from rank 0 to rank 10+: there"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(old, new, said):
    text = plan_texts()[0]
    assert old in text
    with pytest.raises(ConfigError, match=said):
        read_plan(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# placement: 0,999999999\n0F0", "must use every rank from 0 to 999999999"),
        ("# name: \x1b[31mred\n0F0,0B0", r"'\\x1b\[31mred' is no name"),
        ("# name: " + "x" * 1_000_000 + "\n0F0,0B0", "is no name: write up to 200"),
        ("# placement: " + "x" * 1_000_000 + "\n0F0,0B0", "is no placement"),
    ],
)
def test_a_schedule_that_would_fill_memory_or_screen_is_refused(text, said):
    with bounded(), pytest.raises(ConfigError, match=said) as refused:
        parse_schedule(text, name="mine")
    assert_is_told_well(refused.value)


def test_ops_that_a_few_cells_leave_out_are_not_counted_one_by_one():
    ops = ",".join(f"0F{at}" for at in range(50_000))
    text = f"# placement: {','.join(['0'] * 50_000)}\n{ops}"
    schedule = parse_schedule(text, name="wide")
    with (
        bounded(),
        pytest.raises(ScheduleError, match="take at least 2,500,000,000 ops, and there are 50,000"),
    ):
        simulate(schedule, Flow.chain(50_000), Costs.uniform(50_000))


def test_a_schedule_too_large_to_be_priced_is_refused(tmp_path, capsys):
    (tmp_path / "s.csv").write_text("\n".join(f"{rank}F0" for rank in range(20_000)))
    with bounded(), pytest.raises(SystemExit):
        main(["schedule", "--file", str(tmp_path / "s.csv")])
    assert "20000 ranks × 20000 stages make more than" in capsys.readouterr().err


def test_a_cluster_larger_than_any_is_refused_before_it_is_built(tmp_path):
    path = tmp_path / "cluster.toml"
    for count in (10**5, 10**12):
        path.write_text(f'[[hosts]]\ncount = {count}\ndevices = [{{kind = "H100", count = {count}}}]')
        with bounded(), pytest.raises(ConfigError, match=r"at most 262,?144"):
            read_cluster(path)


def test_a_message_gives_the_terminal_nothing_to_obey(tmp_path, capsys):
    place = tmp_path / "\x1b[31mrun"
    (place / "one").mkdir(parents=True)
    (place / "one" / "run.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["show", str(place)])
    told = capsys.readouterr().err
    assert "name one of the runs in it" in told
    assert "\x1b" not in told


@pytest.mark.parametrize("text", ["[" * 100_000, HUGE, '{"measured": {"seconds": 1e999}}', "\0", "[]"])
def test_a_measurement_that_is_none_is_made_again(tmp_path, text):
    cache = Cache(tmp_path, Place("cpu", "2", 1))
    path = cache._path("node")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert cache.find("node") is None


MODEL = """
from unsplit import mean_square, mlp, regression

def build():
    return mlp(4, 8, 8, 1), mean_square, regression()
"""


def test_no_plan_or_configuration_starts_processes_without_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "launch", lambda *args, **options: pytest.fail("processes were started"))
    Path("model.py").write_text(MODEL)
    Path("run.toml").write_text('[model]\nfunction = "model.py:build"\n')
    Path("wide.toml").write_text(Path("run.toml").read_text() + "[pipeline]\ndata_ranks = 1000000")
    Path("plan.toml").write_text(plan_texts()[0].replace("data = 1", "data = 1000000"))
    for command in (["wide.toml"], ["run.toml", "--plan", "plan.toml"]):
        with pytest.raises(SystemExit):
            main(["train", *command, "--device", "cpu"])
        assert "are 2,000,000 processes; here at most" in capsys.readouterr().err
