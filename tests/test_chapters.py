"""docs/concepts.md and docs/schedules.md: each picture and each number is what the command beside it makes.

The commands run in this process, because starting one for each would take a minute. What stands in the block
of text below a block of commands, or of Python, are lines of what it prints, in order.
"""

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise, product
from pathlib import Path

import pytest

from evenflow.cli.main import main
from evenflow.cost_table import rank_activations
from evenflow.errors import ConfigError
from evenflow.ir import Costs, Flow
from evenflow.memory import peak_bytes
from evenflow.schedules.catalog import SCHEDULES, default_stages_per_rank, get
from evenflow.simulate import simulate

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHAPTERS = ("concepts", "schedules")

_BLOCK = re.compile(r"(?:^<!-- not run: (.*?) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_GIVEN = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """What stands in a fence, and in the block of text that follows it, if one does."""

    chapter: str
    kind: str
    code: str
    shown: str

    def __str__(self) -> str:
        last = self.code.splitlines()[-1].replace("evenflow schedule ", "")
        return f"{self.chapter}: {last}"


def page(chapter: str) -> str:
    return (DOCS / f"{chapter}.md").read_text()


def blocks(chapter: str, kind: str) -> list[Block]:
    """The blocks of a kind that are run, by `tests/test_pages.py` or here."""
    found = [match.groups() for match in _BLOCK.finditer(page(chapter))]
    return [
        Block(chapter, kind, code, shown if following == "text" else "")
        for (reason, each, code), (_, following, shown) in pairwise([*found, (None, "", "")])
        if each == kind and (reason is None or Path(__file__).name in reason)
    ]


SHELL = [block for chapter in CHAPTERS for block in blocks(chapter, "sh")]


def typed(commands: str) -> str:
    """Do in this folder what a block of commands says; what it prints."""
    for name, text in _GIVEN.findall(commands):
        Path(name).write_text(text)
    printed = io.StringIO()
    for line in _GIVEN.sub("", commands).splitlines():
        program, *words = shlex.split(line)
        assert program == "evenflow"
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as exited:
            main(words)
        assert exited.value.code == 0
    return printed.getvalue()


def assert_shown(shown: str, printed: str) -> None:
    lines = iter([line.rstrip() for line in printed.splitlines()])
    for line in shown.splitlines():
        assert line.rstrip() in lines, f"the page shows {line!r}, which is not printed, or not there"


def seen(svg: str) -> str | list[str]:
    """What a picture shows; of another matplotlib, which places things elsewhere, what is written on it."""
    pinned = f"matplotlib=={metadata.version('matplotlib')}\n" in (ROOT / "constraints.txt").read_text()
    return svg if pinned else re.findall(r">([^<>\n]+)</text>", svg)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_a_command_draws_and_prints_what_the_page_shows(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = DOCS / block.chapter
    for own in pictures.glob("*.csv"):
        Path(own.name).write_text(own.read_text())
    assert_shown(block.shown, typed(block.code))
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [each.name for each in drawn] == sorted(re.findall(r"--draw (\S+)", block.code))
    for each in drawn:
        assert seen(each.read_text()) == seen((pictures / each.name).read_text()), each.name
        assert each.stat().st_size < 60_000


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_picture_stands_on_its_page_and_has_its_command(chapter):
    drawn = re.findall(r"--draw (\S+)", page(chapter))
    assert len(drawn) == len(set(drawn))
    assert sorted(drawn) == sorted(each.name for each in (DOCS / chapter).glob("*.svg"))
    assert sorted(re.findall(rf"!\[[^\]]+\]\({chapter}/(\S+)\)", page(chapter))) == sorted(drawn)


def test_python_prints_what_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "concepts"}
    for block in blocks("concepts", "python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.code, "docs/concepts.md", "exec"), names)
        assert_shown(block.shown, printed.getvalue())
        assert bool(block.shown) == bool(printed.getvalue())


def measured(name: str, num_ranks: int, stages_per_rank: int, num_microbatches: int) -> tuple[float, float]:
    """The idle share of the step, and the most microbatches that a rank holds, of equal ops."""
    schedule = get(name)(num_ranks, stages_per_rank, num_microbatches)
    costs = Costs.of_ranks(schedule.placement, *[(1.0,) * num_ranks] * 3)
    timeline = simulate(schedule, Flow.chain(costs.num_stages), costs)
    wholes = rank_activations(costs, schedule.placement)
    held = [peak / whole for peak, whole in zip(peak_bytes(schedule, costs), wholes, strict=True)]
    return timeline.bubble, max(held)


ROWS = {
    cells[0]: cells[1:]
    for line in page("schedules").splitlines()
    if (cells := [cell.strip(" `") for cell in line.strip("| ").split(" | ")])[0] in SCHEDULES
}


def test_the_table_names_every_schedule():
    assert list(ROWS) == list(SCHEDULES)
    headings = re.findall(r"^## (\S+)$", page("schedules"), re.MULTILINE)
    assert headings == [*SCHEDULES, "auto"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_formulas_of_the_table_are_those_of_the_schedules(name):
    stages, idle, held = ROWS[name]
    usual = default_stages_per_rank(name)
    numbers = {"any": (usual, usual + 1)}.get(stages) or (int(stages),)
    assert usual in numbers
    if stages != "any":
        with pytest.raises(ConfigError):
            get(name)(4, 3 - int(stages), 8)
    settings = [(2, 4), (3, 6), (4, 8), (4, 16), (8, 16)]
    for (p, m), v in product(settings, numbers):
        bubble, most = measured(name, p, v, m)
        sizes = {"p": p, "m": m, "v": v, "min": min}
        if "%" not in idle:
            assert bubble == pytest.approx(eval(idle, {}, sizes)), (p, m, v)
        if held != "nothing":
            assert most == pytest.approx(eval(held, {}, sizes)), (p, m, v)
    for percent, p, m in re.findall(r"([\d.]+) % for (\d+)(?: ranks)? and (\d+)", idle):
        assert f"{100 * measured(name, int(p), usual, int(m))[0]:.1f}" == percent
