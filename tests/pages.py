"""The pages of the documentation as programs: their blocks, read and run in order.

Run as a script (`python pages.py PAGE EXPRESSION…`) this process runs the page's blocks in the folder that it
is in, and writes what the expressions are afterwards to the last line of its output, as JSON.
"""

import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import typer
import typer.core
import yaml

_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_ROOT = Path(__file__).parents[1]
_TESTS = re.compile(r"tests/[\w/]+(?:\.py)?")
_NOT_RUN = re.compile(r"^ *<!-- not run", re.MULTILINE)

# What a page may hold. The first two are run; `bash` is for elsewhere (Slurm): its syntax is checked.
RUN = ("python", "sh")
LANGUAGES = (*RUN, "bash", "text", "toml", "yaml", "csv", "json", "")

# No block that is run may reach beyond its folder.
_UNSAFE = re.compile(r"\b(git|pip|curl|wget|docker|sudo|apt|apt-get|srun|sbatch|kubectl|ray|make)\b")
_TYPED = re.compile(r"^(evenflow|torchrun|python3?|make|\$) ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block; `line` is that of its first line in the page, counted from 1."""

    language: str
    text: str
    line: int
    not_run: str | None

    @property
    def runs(self) -> bool:
        return self.language in RUN and self.not_run is None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        source = textwrap.dedent(match["text"])
        found.append(Block(match["language"], source, line, match["reason"]))
    return found


def faults(page: Path) -> list[str]:
    """What is wrong with a page's blocks before anything is run."""
    blocks, text = blocks_of(page), page.read_text()
    found = []
    if len(_NOT_RUN.findall(text)) != sum(block.not_run is not None for block in blocks):
        found.append("a line <!-- not run: REASON --> is not followed by its block, or gives no reason")
    if text.count("\n```") + text.startswith("```") + len(re.findall(r"\n +```", text)) != 2 * len(blocks):
        found.append("a fence is not closed")
    reasons = " ".join(block.not_run or "" for block in blocks)
    found += [f"there is no {name}" for name in _TESTS.findall(reasons) if not (_ROOT / name).exists()]
    return found + [f"line {block.line}: {fault}" for block in blocks if (fault := _fault(block))]


def _fault(block: Block) -> str | None:
    match block.language:
        case "python":
            try:
                compile(block.text, "block", "exec")
            except SyntaxError as error:
                return str(error)
        case "toml" | "json" | "yaml":
            read = {
                "toml": tomllib.loads,
                "json": json.loads,
                "yaml": lambda text: list(yaml.safe_load_all(text)),
            }
            try:
                read[block.language](block.text)
            except (ValueError, yaml.YAMLError) as error:
                return str(error)
        case "sh" | "bash":
            read = subprocess.run(
                ["bash", "-n"], input=block.text, text=True, capture_output=True, check=False, timeout=20
            )
            if read.returncode:
                return read.stderr
            if block.runs and (unsafe := _UNSAFE.search(block.text)):
                return f"{unsafe[0]} does not run in a test"
            return None if block.runs else _unknown_flag(block.text)
        case language if language not in LANGUAGES:
            return f"a block of {language!r}; there are {LANGUAGES}"
        case _ if typed := _TYPED.search(block.text):
            return f"{typed[0]}… is to be typed: call its block sh"
    return None


def _unknown_flag(script: str) -> str | None:
    """What Evenflow's own parser of arguments says against a line that it is not to run."""
    from evenflow.cli.main import app

    group = typer.main.get_command(app)
    for line in script.replace("\\\n", " ").splitlines():
        if not line.startswith("evenflow "):
            continue
        try:
            _parsed(group, shlex.split(line, comments=True)[1:])
        except Exception as error:  # noqa: BLE001 (whatever the parser raises)
            return f"{line}: {type(error).__name__}: {error}"
    return None


def _parsed(command, words):
    """Parse the words as a command's, and what is left as those of its own commands."""
    while isinstance(command, typer.core.TyperGroup):
        name, *words = words
        command = command.commands[name]
    command.make_context(command.name, words)


def run_blocks(page: Path) -> dict[str, object]:
    """Run the blocks here, one after the other; the names that the blocks of Python have left."""
    names = {"__name__": page.stem}
    for block in blocks_of(page):
        if not block.runs:
            continue
        if block.language == "python":
            # Empty lines before it: a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
            continue
        done = subprocess.run(["bash", "-e"], input=block.text, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{page}, line {block.line}: bash -e ended with {done.returncode}\n{block.text}")
    return names


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    left = run_blocks(Path(sys.argv[1]))
    sys.stdout.write(f"\n{json.dumps([eval(expression, left) for expression in sys.argv[2:]])}\n")
