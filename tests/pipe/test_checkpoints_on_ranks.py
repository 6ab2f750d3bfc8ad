"""Checkpoints between processes: any mesh goes on from any other, and from one process."""

import resource
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from test_mesh import make, text
from torch import distributed as dist

import evenflow
from evenflow.checkpoint.load import open_checkpoint, problems
from evenflow.errors import ConfigError, PeerError

MESHES = {
    "pp": {"mesh": {"pp": 4}},
    "dp": {"mesh": {"pp": 2, "dp": 2}, "schedule": "zb-h1"},
    "zero1": {"mesh": {"pp": 2, "dp": 2}, "shard": "zero1"},
    "fsdp": {"mesh": {"pp": 2, "dp": 2}, "shard": "fsdp"},
    "tp": {"mesh": {"pp": 2, "tp": 2}},
}
ONE, SAVED_AT, STEPS = "one process", 2, 4


def start(name: str) -> evenflow.Pipeline:
    options = MESHES.get(name, {"stages": 2})
    return make(num_microbatches=4, clip_norm=1.0, **options)


def steps(pipe, numbers) -> list[float]:
    return [float(pipe.step(text(number)).loss) for number in numbers]


def run(name: str, folder: Path) -> list[float]:
    """Save in the middle of a run, written while it goes on."""
    pipe = start(name)
    steps(pipe, range(SAVED_AT))
    pipe.save(folder / name, wait=False)
    found = steps(pipe, range(SAVED_AT, STEPS))
    pipe.saved()
    pipe.close()
    return found


def go_on(name: str, *folders: Path) -> list[list[float]]:
    """From each of them, one after the other."""
    pipe, found = start(name), []
    for folder in folders:
        pipe.load(folder)
        found.append(steps(pipe, range(SAVED_AT, STEPS)))
    pipe.close()
    return found


def fed(folder: Path) -> tuple[list[float], int, int, int]:
    """What only the first rank reads goes on too, and all ranks know how far it is."""
    pipe, loader = start("pp"), [text(number) for number in range(STEPS)] if dist.get_rank() == 0 else None
    for number, batch in enumerate(pipe.feed(loader), start=1):
        pipe.step(batch)
        if number == SAVED_AT:
            pipe.save(folder / "fed")
    again = start("dp")
    again.load(folder / "fed")
    before = again.epoch
    found = [float(again.step(batch).loss) for batch in again.feed(loader)]
    return found, pipe.epoch, before, again.epoch


def refused(folder: Path) -> str:
    """What one rank cannot read: it says so, the others say whose fault it is, and nothing has changed."""
    pipe = start("pp")
    before = {name: float(parameter.sum()) for name, parameter in pipe.named_parameters()}
    with pytest.raises((ConfigError, PeerError)) as error:
        pipe.load(folder / "broken")
    assert before == {name: float(parameter.sum()) for name, parameter in pipe.named_parameters()}
    return f"{type(error.value).__name__}: {error.value}"


@contextmanager
def full(place: bool):
    """Inside, a file can't have more than a part of a checkpoint's bytes, where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]) if place else before)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(folder: Path, on_error: str) -> tuple[str, int, int]:
    """One rank's, while the second and the third checkpoint are written: what is raised, and what stays."""
    pipe, raised = start("pp"), ""
    checkpoints = evenflow.Checkpoints(pipe, folder / f"full {on_error}", every=1, on_error=on_error)
    try:
        for number in range(4):
            pipe.step(text(number))
            with full(number in (1, 2) and dist.get_rank() == 2):
                checkpoints.updated()
                pipe._saver._written.exception()  # it is written, or not
        checkpoints.wait()
    except Exception as error:  # noqa: BLE001 (it is what the test looks at)
        raised = f"{type(error).__name__}: {error}"
    again = start("pp")
    evenflow.Checkpoints(again, folder / f"full {on_error}", every=1).resume()
    return raised, pipe.num_updates, again.num_updates


def on_ranks(folder: Path):
    dist.init_process_group("gloo")
    found = {("run", name): run(name, folder) for name in MESHES}
    for name in MESHES:
        others = [saved for saved in (*MESHES, ONE) if name != saved]
        taken = go_on(name, *(folder / saved for saved in others))
        found |= {(name, saved): losses for saved, losses in zip(others, taken, strict=True)}
    disks = {on_error: full_disk(folder, on_error) for on_error in ("continue", "stop")}
    return found, refused(folder), fed(folder), disks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def results(folder: Path):
    expected = run(ONE, folder)
    (folder / "broken").mkdir()
    for path in (folder / ONE).iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            table = open_checkpoint(folder / ONE).table["model.model.embed_tokens.weight"]
            raw = (folder / ONE / table.chunks[0].file).read_bytes()
            at = raw.index(open_checkpoint(folder / ONE).tensors([table.name])[table.name].numpy().tobytes())
            content[at] ^= 1
        (folder / "broken" / path.name).write_bytes(content)
    return expected, evenflow.launch(on_ranks, folder, nproc=4)


def test_any_mesh_goes_on_from_any_other(folder):
    expected, ranks = results(folder)
    for found, *_ in ranks:
        for (name, saved), losses in found.items():
            most = 1e-5 if "tp" in (name, saved) else 1e-6
            assert losses == pytest.approx(expected, rel=most), f"{name} from {saved}"
    assert ranks[0][0]["pp", ONE] == expected, "only the number of stages changed"
    assert ranks[0][0]["run", "pp"] == expected


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of what a checkpoint holds, without that of single processes."""
    table = open_checkpoint(folder).table
    return {name: saved.shape for name, saved in table.items() if not name.startswith("processes")}


def test_one_process_goes_on_from_any_mesh(folder):
    expected, _ = results(folder)
    for name, found in zip(MESHES, go_on(ONE, *(folder / each for each in MESHES)), strict=True):
        assert problems(open_checkpoint(folder / name)) == []
        assert found == pytest.approx(expected, rel=1e-5 if name == "tp" else 1e-6), name
        assert shapes(folder / name) == shapes(folder / ONE)


def test_one_rank_cannot_read(folder):
    _, ranks = results(folder)
    texts = [refusal for _, refusal, *_ in ranks]
    assert texts[0].startswith("ConfigError: load(")
    assert "model.model.embed_tokens.weight in tensors-00000.safetensors is damaged" in texts[0]
    assert all(each.startswith("PeerError: rank 0 refused what load(") for each in texts[1:])


def test_all_ranks_know_how_far_a_loader_was_read(folder):
    expected, ranks = results(folder)
    for _, _, (losses, *epochs), _ in ranks:
        assert losses == pytest.approx(expected, rel=1e-6)
        assert epochs == [1, 0, 1]


def test_a_full_disk_of_one_rank(folder):
    _, ranks = results(folder)
    for number, (*_, disks) in enumerate(ranks):
        assert disks["continue"] == ("", 4, 4), "training goes on, and the next one is whole"
        raised, made, kept = disks["stop"]
        assert (made, kept) == (3, 1), "the next save hears of it; the previous one stays valid"
        expected = "File too large" if number == 2 else "PeerError: rank 2 failed to write"
        assert expected in raised
