"""Checkpoints: any layout goes on from any other; what is not whole, or not this model's, is refused."""

import itertools
import json
import random
import resource
import shutil
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import evenflow
from evenflow.checkpoint.load import open_checkpoint, problems
from evenflow.checkpoint.manifest import FileRecord, checkpoints_in, read_manifest, write_manifest
from evenflow.checkpoint.save import write_checkpoint
from evenflow.errors import ConfigError
from unsplit import mean_square, mlp

WIDTH, STEPS, SAVED_AT = 8, 10, 5
LAYOUTS = {
    1: [("1f1b", 1)],
    2: [("gpipe", 1), ("zb-h1", 1)],
    4: [("1f1b", 1), ("interleaved-1f1b", 2), ("zb-v", 2)],
    3: [("zb-auto", 1), ("sequential", 1)],
}


def blocks() -> nn.Sequential:
    """A model that draws, and has a buffer that its forward changes."""
    torch.manual_seed(0)
    block = [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Tanh()]
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), *block[1:]) for _ in range(4)]
    return nn.Sequential(*layers, nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(STEPS, 8, WIDTH + 1, generator=generator)
    return [{"x": each[:, :WIDTH], "y": each[:, WIDTH:]} for each in numbers]


def adam(parameters):
    decayed, rest = [[p for p in parameters if (p[1].ndim > 1) == wide] for wide in (True, False)]
    return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.01)


def warm(optimizer):
    schedules = torch.optim.lr_scheduler
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=3), schedules.MultiStepLR(optimizer, [3, 5, 5])]
    return schedules.SequentialLR(optimizer, parts, [3])


def make(stages: int = 2, schedule: str = "1f1b", on_each: int = 1, model=None, **options):
    options = {"optimizer": adam, "scheduler": warm, "clip_norm": 1.0, "num_microbatches": 4} | options
    options = {"loss": mean_square} | options
    return evenflow.pipeline(
        blocks() if model is None else model,
        example=batches()[0],
        stages=stages,
        schedule=schedule,
        stages_per_rank=on_each,
        device="cpu",
        **options,
    )


def losses(pipe, loader) -> list[float]:
    return [float(pipe.step(batch).loss) for batch in pipe.feed(loader)]


@cache
def saved(place: Path, stages: int, schedule: str, on_each: int, **options) -> tuple[Path, list[float]]:
    """A checkpoint of an uninterrupted run, and that run's losses after it."""
    folder = place / f"{stages} {schedule}"
    pipe, found = make(stages, schedule, on_each), []
    for number, batch in enumerate(pipe.feed(batches()), start=1):
        found.append(float(pipe.step(batch).loss))
        if number == SAVED_AT:
            pipe.save(folder, extra={"said": [1.5, ("two", None)], "t": torch.ones(2)})
    return folder, found[SAVED_AT:]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


ALL = [(stages, *each) for stages, layouts in LAYOUTS.items() for each in layouts]


@pytest.mark.parametrize("before", [each for each in ALL if each[0] != 3], ids=str)
def test_every_layout_goes_on_from_every_other(place, before):
    folder, expected = saved(place, *before)
    for layout in ALL:
        pipe = make(*layout)
        extra = pipe.load(folder)
        assert losses(pipe, batches()) == expected, layout
        assert (extra["said"], extra["t"].tolist()) == ([1.5, ("two", None)], [1.0, 1.0])
        assert (pipe.num_updates, pipe.epoch) == (STEPS, 1)


def test_other_masters_scale_and_momenta(tmp_path):
    """Of bfloat16 parameters, of float16's loss scale, and of optimizers beside each other."""

    def several(parameters):
        wide, rest = [[p for p in parameters if (p[1].ndim > 1) == wide] for wide in (True, False)]
        return [torch.optim.SGD(wide, lr=0.1, momentum=0.9), torch.optim.RMSprop(rest, lr=0.01)]

    for options in (
        {"precision": "bf16-pure"},
        {"precision": "fp16"},
        {"optimizer": several, "scheduler": None},
    ):
        one = make(2, model=mlp(WIDTH, 8, 8, 8, 1), **options)
        other = make(4, "zb-h1", model=mlp(WIDTH, 8, 8, 8, 1), seed=3, **options)
        for batch in batches()[:3]:
            one.step(batch)
        one.save(tmp_path / "saved")
        other.load(tmp_path / "saved")
        expected = [one.step(batch) for batch in batches()[3:]]
        found = [other.step(batch) for batch in batches()[3:]]
        assert [float(each.loss) for each in found] == [float(each.loss) for each in expected], options
        assert [float(each.grad_norm) for each in found] == [float(each.grad_norm) for each in expected]


def test_without_the_optimizer(place):
    folder, _ = saved(place, *ALL[0])
    pipe = make(2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), scheduler=None)
    pipe.load(folder, optimizer=False)
    assert pipe.num_updates == 0
    with pytest.raises(ConfigError, match="it has states of AdamW, and optimizer= makes SGD"):
        pipe.load(folder)


def rates(parameters):
    """A group for each of some parameters, with a rate of its own."""
    several = [{"params": [each], "lr": 0.01 * (1 + len(each[0]) % 3)} for each in parameters]
    return torch.optim.SGD(several)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        warm,
    ],
)
def test_groups_with_rates_of_their_own(tmp_path, scheduler):
    """Stages have other groups at other cuts, and schedulers numbers for each."""
    one = make(3, optimizer=rates, scheduler=scheduler, clip_norm=None)
    for batch in batches()[:3]:
        one.step(batch)
    one.save(tmp_path / "saved")
    expected = [float(one.step(batch).loss) for batch in batches()[3:]]
    for stages in (1, 2, 4):
        other = make(stages, optimizer=rates, scheduler=scheduler, clip_norm=None)
        other.load(tmp_path / "saved")
        assert [float(other.step(batch).loss) for batch in batches()[3:]] == expected, stages


def test_a_scheduler_that_takes_its_state_apart(tmp_path):
    def cyclic(optimizer):
        return torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2)

    one, other = (
        make(n, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), scheduler=cyclic)
        for n in (2, 4)
    )
    one.step(batches()[0])
    one.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    assert losses(other, batches()[1:]) == losses(one, batches()[1:])


def test_draws_go_on_whatever_the_seed(tmp_path, caplog):
    one, other = make(2), make(4, seed=7)
    one.step(batches()[0])
    one.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    assert "seed=7 gives way to the checkpoint's, 0" in caplog.text
    assert losses(other, batches()[1:]) == losses(one, batches()[1:])


class Wide(torch.optim.Optimizer):
    """Keeps float32 sums of the gradients of parameters of fewer bits."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for each in group["params"]:
                total = self.state[each].setdefault("total", torch.zeros_like(each, dtype=torch.float32))
                total += each.grad.float() * 0.001
                each.sub_(group["lr"] * total.to(each.dtype))


def test_states_keep_their_type(tmp_path):
    """Also where they have more bits than their parameter."""

    def start():
        model = mlp(WIDTH, 8, 1).bfloat16()
        return make(model=model, optimizer=Wide, scheduler=None, clip_norm=None, loss=narrow)

    def narrow(model, batch):
        return mean_square(model, {name: tensor.bfloat16() for name, tensor in batch.items()})

    one, other = start(), start()
    for batch in batches()[:3]:
        one.step(batch)
    one.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    pairs = [
        (mine["total"], its["total"])
        for a, b in zip(one.optimizers.values(), other.optimizers.values(), strict=True)
        for mine, its in zip(a.state.values(), b.state.values(), strict=True)
    ]
    assert len(pairs) == 4
    assert all(torch.equal(mine, its) and its.dtype == torch.float32 for mine, its in pairs)


# -- data


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, at):
        return {"x": torch.full((WIDTH,), float(at)), "y": torch.full((1,), random.random())}


class Counting:
    """A loader that knows where it is, and counts what it reads."""

    def __init__(self):
        self.at, self.read = 0, 0

    def __iter__(self):
        while self.at < STEPS:
            self.at, self.read = self.at + 1, self.read + 1
            yield batches()[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_data_are_neither_skipped_nor_repeated(tmp_path, at):
    """Shuffled, and with random numbers of Python's in each item: in the middle of a pass and between two."""

    def run(pipe, stop=None):
        seen = []
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=8, shuffle=True)
        while pipe.epoch < 2:
            for batch in pipe.feed(loader):
                seen.append(batch["x"][:, 0].tolist())
                seen.append(float(pipe.step(batch).loss))
                if pipe.num_updates == stop:
                    pipe.save(tmp_path / "saved")
        return seen

    torch.manual_seed(5)
    random.seed(5)
    whole = run(make(), stop=at)
    torch.manual_seed(6)
    random.seed(6)
    again = make(4)
    again.load(tmp_path / "saved")
    assert run(again) == whole[2 * at :]
    assert len(whole) == 12


def test_a_loader_that_knows_where_it_is(tmp_path):
    pipe, loader = make(), Counting()
    for _ in itertools.islice(map(pipe.step, pipe.feed(loader)), 4):
        pass
    pipe.save(tmp_path / "saved")
    expected = losses(pipe, batches()[4:])
    again, loader = make(3), Counting()
    again.load(tmp_path / "saved")
    assert losses(again, loader) == expected
    assert loader.read == STEPS - 4


def test_a_loader_whose_state_spans_passes(tmp_path):
    """Saved between two of them."""

    class Endless(Counting):
        def __iter__(self):
            for _ in range(3):
                self.at, self.read = self.at + 1, self.read + 1
                yield batches()[self.at - 1]

    pipe, loader = make(), Endless()
    losses(pipe, loader)
    pipe.save(tmp_path / "saved")
    expected = losses(pipe, loader)
    again = make()
    again.load(tmp_path / "saved")
    assert losses(again, Endless()) == expected
    assert expected == losses(resumed(tmp_path / "saved"), batches()[3:6])


def resumed(folder: Path):
    pipe = make()
    pipe.load(folder, data=False)
    return pipe


def test_a_pass_inside_of_another_is_not_counted(tmp_path):
    pipe = make()
    for number, batch in enumerate(pipe.feed(batches()), start=1):
        pipe.step(batch)
        for other in pipe.feed(batches()[:2]):
            pipe.evaluate(other)
        assert pipe.epoch == 0
        if number == 4:
            pipe.save(tmp_path / "saved")
            break
    again = make()
    again.load(tmp_path / "saved")
    assert len(losses(again, batches())) == STEPS - 4
    assert len(losses(again, batches())) == STEPS
    assert again.epoch == 2


# -- many, in a folder


def test_checkpoints_keeps_the_last(tmp_path):
    with evenflow.Checkpoints(make(), tmp_path, every=2, keep_last=2) as checkpoints:
        checkpoints.pipe.save(tmp_path / "mine 99")
        for number, batch in enumerate(batches()):
            checkpoints.pipe.step(batch)
            checkpoints.updated({"number": number})
    names = [each.name for each in checkpoints_in(tmp_path)]
    assert names == ["step-00000008", "step-00000010", "mine 99"]
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000012.partial")
    (tmp_path / "step-00000011").mkdir()
    again = evenflow.Checkpoints(make(4), tmp_path, every=2)
    assert again.resume() == tmp_path / "step-00000010"
    assert again.extra == {"number": 9}
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names)
    assert evenflow.Checkpoints(make(), tmp_path / "none", every=2).resume() is None


def test_resume_goes_back_where_the_newest_is_broken(tmp_path, caplog):
    with evenflow.Checkpoints(make(), tmp_path, every=2) as checkpoints:
        for batch in batches()[:4]:
            checkpoints.pipe.step(batch)
            checkpoints.updated()
    flip(next((tmp_path / "step-00000004").glob("*.safetensors")), -1)
    again = evenflow.Checkpoints(make(), tmp_path, every=2)
    assert again.resume() == tmp_path / "step-00000002"
    assert "going back to an older checkpoint" in caplog.text
    flip(next((tmp_path / "step-00000002").glob("*.safetensors")), -1)
    with pytest.raises(ConfigError, match="damaged"):
        again.resume()


def test_later_checkpoints_that_are_broken_push_nothing_out(tmp_path):
    """After going back to an older one."""
    for number, kept in ((0, 6), (2, 2)):
        with evenflow.Checkpoints(make(), tmp_path, every=2, keep_last=kept // 2) as checkpoints:
            checkpoints.resume()
            for batch in batches()[number : number + (6 if number == 0 else 2)]:
                checkpoints.pipe.step(batch)
                checkpoints.updated()
        for step in (4, 6) if number == 0 else ():
            flip(next((tmp_path / f"step-{step:08}").glob("*.safetensors")), -1)
    assert [each.name for each in checkpoints_in(tmp_path)] == ["step-00000004", "step-00000006"]
    again = evenflow.Checkpoints(make(), tmp_path, every=2)
    assert again.resume().name == "step-00000004"


def test_what_was_cut_short_between_two_names_is_put_back(tmp_path):
    with evenflow.Checkpoints(make(), tmp_path, every=1) as checkpoints:
        checkpoints.pipe.step(batches()[0])
        checkpoints.updated()
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced")
    (tmp_path / "step-00000001.keep").mkdir()
    assert evenflow.Checkpoints(make(), tmp_path, every=1).resume() == tmp_path / "step-00000001"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-00000001", "step-00000001.keep"]


def test_steps_that_update_nothing_save_nothing(tmp_path):
    pipe = make(bad_numbers="skip")
    checkpoints = evenflow.Checkpoints(pipe, tmp_path, every=1)
    pipe.step(batches()[0], update=False)
    checkpoints.updated()
    pipe.step(batches()[0])
    checkpoints.updated()
    pipe.step({name: tensor * float("nan") for name, tensor in batches()[0].items()})
    checkpoints.updated()
    checkpoints.wait()
    assert [each.name for each in checkpoints_in(tmp_path)] == ["step-00000001"]
    assert pipe.num_updates == 1


def test_save_replaces_nothing_but_checkpoints(tmp_path):
    pipe = make()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("of work")
    for name, said in (("project", r"holds something else \(thesis\.txt\)"), ("file", "it is a file")):
        with pytest.raises(ConfigError, match=said):
            pipe.save(tmp_path / name)
    assert (tmp_path / "project" / "thesis.txt").read_text() == "years"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "project"]


def test_a_save_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    pipe, rename = make(), Path.rename
    pipe.step(batches()[0])
    pipe.save(tmp_path / "saved")
    pipe.step(batches()[1])

    def refused(path, target):
        if path.suffix == ".partial":
            raise OSError("not now")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        with pytest.raises(OSError, match="not now"):
            pipe.save(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").manifest.step == 1


def test_a_save_that_failed_is_heard_of_at_the_next(tmp_path, monkeypatch):
    pipe = make()

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("evenflow.pipe.saving.saver.write_checkpoint", fail)
        pipe.save(tmp_path / "one", wait=False)
        with pytest.raises(OSError, match="no space left"):
            pipe.save(tmp_path / "two", wait=False)
    pipe.save(tmp_path / "three")
    assert [each.name for each in tmp_path.iterdir()] == ["three"]


def test_what_is_saved_is_what_was_there(tmp_path, monkeypatch):
    """Written when steps have changed all of it."""
    pipe, expected, go_on = make(), make(), threading.Event()

    def late(*given):
        go_on.wait(60)
        write_checkpoint(*given)

    monkeypatch.setattr("evenflow.pipe.saving.saver.write_checkpoint", late)
    for batch in batches()[:3]:
        pipe.step(batch)
        expected.step(batch)
    pipe.save(tmp_path / "saved", wait=False)
    for batch in batches()[3:]:
        pipe.step(batch)
    go_on.set()
    pipe.saved()
    again = make()
    again.load(tmp_path / "saved")
    assert losses(again, batches()[3:]) == losses(expected, batches()[3:])


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_full_disk(tmp_path, caplog, on_error):
    """In the middle of a save: a file may not be longer than a part of it."""
    pipe = make(model=mlp(WIDTH, 256, 256, 1))
    checkpoints = evenflow.Checkpoints(pipe, tmp_path, every=1, on_error=on_error)
    pipe.step(batches()[0])
    checkpoints.updated()
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
    try:
        pipe.step(batches()[1])
        checkpoints.updated()
        if on_error == "stop":
            with pytest.raises(Exception, match=r"(?i)file too large"):
                checkpoints.save()
        else:
            pipe.step(batches()[2])
            checkpoints.updated()
            with pytest.raises(Exception, match=r"(?i)file too large"):
                checkpoints.wait()
            pipe.step(batches()[3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if on_error == "continue":
        checkpoints.updated()
        checkpoints.wait()
        assert caplog.text.count("a checkpoint was not written, training goes on without") == 1
    newest = {"stop": 1, "continue": 4}[on_error]
    again = evenflow.Checkpoints(make(model=mlp(WIDTH, 256, 256, 1)), tmp_path, every=1)
    assert again.resume() == tmp_path / f"step-{newest:08}"


def test_rolled_back(tmp_path):
    """To the checkpoint before the bad batch; what is behind it is trained on, and nothing again."""
    bad = [{name: tensor * float("nan") for name, tensor in batches()[0].items()}]
    pipe, found, back = make(bad_numbers="stop"), [], []
    with evenflow.Checkpoints(pipe, tmp_path, every=2) as checkpoints:
        for batch in pipe.feed(batches()[:5] + bad + batches()[6:]):
            try:
                found.append(float(pipe.step(batch).loss))
                checkpoints.updated()
            except evenflow.BadNumbersError as error:
                back.append(checkpoints.roll_back(error).name)
    assert back == ["step-00000004"]
    assert (pipe.num_updates, pipe.epoch) == (8, 1)
    expected = make(bad_numbers="stop")
    assert found[:5] == losses(expected, batches()[:5])
    expected.load(tmp_path / "step-00000008")
    assert [each.name for each in checkpoints_in(tmp_path)] == [f"step-{at:08}" for at in (2, 4, 6, 8)]
    again = make()
    again.load(tmp_path / "step-00000004", data=False)
    assert found[5:] == losses(again, batches()[6:])


def test_rolled_back_in_vain(tmp_path):
    pipe = make(bad_numbers="stop")
    checkpoints = evenflow.Checkpoints(pipe, tmp_path, every=1)
    bad = {name: tensor * float("nan") for name, tensor in batches()[0].items()}

    def fail():
        try:
            pipe.step(bad)
        except evenflow.BadNumbersError as error:
            return checkpoints.roll_back(error)

    with pytest.raises(evenflow.BadNumbersError) as error:
        fail()
    assert "no checkpoint" in error.value.__notes__[0]
    pipe.step(batches()[0])
    checkpoints.updated()
    for _ in range(3):
        assert fail().name == "step-00000001"
    with pytest.raises(evenflow.BadNumbersError) as error:
        fail()
    assert "rolled back to 3 times before" in error.value.__notes__[0]


def test_wrong_numbers():
    for options in ({"every": 0}, {"every": 1, "keep_last": 0}, {"every": 1, "on_error": "warn"}):
        with pytest.raises(ConfigError, match="Checkpoints"):
            evenflow.Checkpoints(make(), "nowhere", **options)


# -- what is refused


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(bytes(content))


@pytest.fixture
def copied(place, tmp_path) -> Path:
    return shutil.copytree(saved(place, *ALL[0])[0], tmp_path / "copy")


def test_every_flipped_byte_is_found(place, tmp_path, copied):
    """In each file, at its beginning and end and all over it: by its name, and changing nothing."""
    pipe, generator = make(), random.Random(0)
    before = {name: parameter.detach().clone() for name, parameter in pipe.named_parameters()}
    for path in sorted(copied.iterdir()):
        size = path.stat().st_size
        for at in [0, 9, size // 2, size - 1, *(generator.randrange(size) for _ in range(8))]:
            if path.suffix == ".json" and at == size - 1:
                continue  # the newline behind the manifest
            flip(path, at)
            with pytest.raises(ConfigError, match=path.name.replace(".", r"\.")) as error:
                pipe.load(copied)
            assert any(word in str(error.value) for word in ("damaged", "cannot be read", "version"))
            flip(path, at)
    assert all(torch.equal(before[name], parameter) for name, parameter in pipe.named_parameters())
    pipe.load(copied)


def test_cut_short_or_missing(copied):
    pipe = make()
    for path in sorted(copied.iterdir()):
        content = path.read_bytes()
        for length in (0, 7, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:length])
            with pytest.raises(ConfigError, match=path.name.replace(".", r"\.")):
                pipe.load(copied)
        path.unlink()
        with pytest.raises(ConfigError, match=path.name.replace(".", r"\.")):
            pipe.load(copied)
        path.write_bytes(content)
    assert problems(open_checkpoint(copied)) == []


def rewritten(folder: Path, name: str, change) -> None:
    """As a stranger would: with the right checksums."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    manifest = read_manifest(folder)
    files = tuple(FileRecord.of(folder / f.name) if f.name == name else f for f in manifest.files)
    write_manifest(folder, replace(manifest, files=files))


TOO_LARGE = ("huge in the file", "other type", "twice as often")


def test_tables_of_strangers(copied, place):
    original = saved(place, *ALL[0])[0]

    def first(table):
        return next(each for each in table["tensors"] if each["name"] == "model.0.0.weight")

    changes = {
        "outside": lambda t: first(t)["chunks"][0].update(file="../secret.safetensors"),
        "of another form": lambda t: [
            part.update(shape=[4, 16])
            for each in t["tensors"]
            if each["name"] == "optimizer.0.0.weight.exp_avg"
            for part in (each, each["chunks"][0])
        ],
        "huge": lambda t: first(t).update(shape=[10**9, 10**9]),
        "negative": lambda t: first(t)["chunks"][0].update(offsets=[-1, 0]),
        "elsewhere": lambda t: first(t)["chunks"][0].update(key="model.1.0.weight"),
        "nowhere": lambda t: first(t)["chunks"][0].update(key="none"),
        "other type": lambda t: first(t).update(dtype="float64"),
        "no type": lambda t: first(t).update(dtype="pickle"),
        "half": lambda t: first(t)["chunks"][0].update(shape=[4, 8]),
        "twice": lambda t: t["tensors"].append(first(t)),
        "overlapping": lambda t: first(t).update(
            chunks=[first(t)["chunks"][0] | {"shape": [4, 8], "offsets": [at, 0]} for at in (0, 2)]
        ),
        "over": lambda t: first(t).update(chunks=first(t)["chunks"] * 2),
        "renamed": lambda t: first(t).update(name="model.else"),
        "huge in the file": lambda t: [
            x.update(shape=[10**9] * 2) for x in (first(t), first(t)["chunks"][0])
        ],
    }
    for name, change in changes.items():
        shutil.rmtree(copied)
        shutil.copytree(original, copied)
        rewritten(copied, "tensors.json", change)
        with pytest.raises(ConfigError) as error:
            make().load(copied)
        assert str(copied) in str(error.value), name
        assert ("not as large as what lies in it" in str(error.value)) == (name in TOO_LARGE), name


def test_states_of_strangers(copied, place):
    original = saved(place, *ALL[0])[0]
    changes = [
        lambda s: s.pop("model"),
        lambda s: s.update(model=[]),
        lambda s: s.update(step="1"),
        lambda s: s.update(seed=None),
        lambda s: s.update(loss_scale={"factor": [], "x": 1}),
        lambda s: s["settings"].update({"0.0.weight": 3}),
        lambda s: s["optimizer"].update({"0.0.weight": {"$tensor": "nothing"}}),
        lambda s: s["optimizer"].update({"0.0.weight": {"$call": "os.system"}}),
        lambda s: s["optimizer"]["0.0.weight"].update(exp_avg=None),
        lambda s: s.update(schedulers={"0": {"_schedulers": 1}}),
        lambda s: s.update(processes={"0": {"random": {"torch": 1}}}),
        lambda s: s.update(processes=[]),
    ]
    for at, change in enumerate(changes):
        shutil.rmtree(copied)
        shutil.copytree(original, copied)
        rewritten(copied, "state.json", change)
        try:
            make().load(copied)
        except ConfigError:
            continue
        assert at in (4, 8), "who needs no loss scale reads none; an optimizer asks for its own tensors"


def test_other_models(place):
    folder, _ = saved(place, *ALL[0])
    model = blocks()
    model[1] = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())
    model[5] = nn.Linear(WIDTH, 1, bias=False)
    model.append(nn.Linear(1, 1))
    faults = r"2 missing from it: 6\.bias, 6\.weight; 2 unexpected in it: 1\.0\.bias, 5\.bias"
    with pytest.raises(ConfigError, match=faults):
        make(model=model).load(folder)
    model = blocks()
    model[5] = nn.Linear(WIDTH, 2)
    pipe = make(model=model, loss=lambda model, batch: model(batch["x"]).mean())
    with pytest.raises(ConfigError, match=r"5\.weight is \[1, 8\] there and \[2, 8\] here"):
        pipe.load(folder)
    with pytest.raises(ConfigError, match=r"is no checkpoint: it has no manifest\.json; name one of those"):
        make().load(folder.parent)


def test_buffers_of_another_shape(place):
    folder, _ = saved(place, *ALL[0])
    model = blocks()
    model[4].register_buffer("more", torch.zeros(3))
    model[4].register_buffer("passing", torch.zeros(3), persistent=False)
    model[4].running_mean = torch.zeros(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pipe = make(1, model=model, loss=lambda model, batch: model[0](batch["x"]).mean())
    with pytest.raises(ConfigError) as error:
        pipe.load(folder)
    assert "1 missing from it: 4.more; 1 of another shape: 4.running_mean is [8] there" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("extra", [{(0, 1): 2}, {"a\x07b": torch.ones(1)}, {"a": {1, 2}}], ids=str)
def test_what_could_not_be_read_back_is_not_written(tmp_path, extra):
    with pytest.raises(ConfigError, match="of the run's state"):
        make().save(tmp_path / "saved", extra=extra)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_that_is_closed_leaves_no_thread(tmp_path):
    before = set(threading.enumerate())
    pipe = make()
    pipe.save(tmp_path / "saved", wait=False)
    pipe.close()
    assert set(threading.enumerate()) == before
    make().load(tmp_path / "saved")


def test_what_is_no_plain_data(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["odd"] = lambda: None

    pipe = make(optimizer=lambda parameters: Odd(parameters, lr=0.1), scheduler=None)
    pipe.step(batches()[0])
    with pytest.raises(ConfigError, match=r"optimizer\..*\.odd of the run's state is a function"):
        pipe.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    pipe = make()
    pipe.step(batches()[0], update=False)
    with pytest.raises(ConfigError, match=r"save\(\) was called while gradients accumulate"):
        pipe.save(tmp_path / "saved")
