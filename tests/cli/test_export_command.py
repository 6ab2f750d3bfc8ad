"""`evenflow export`: what was planned and saved, in other systems' words, and no planning in between."""

from pathlib import Path

import pytest

from evenflow.cli.main import main
from evenflow.schedule_file import parse_schedule
from evenflow.schedules.catalog import get

CONFIG = Path(__file__).parents[2] / "examples" / "train_gpt.toml"
SIZES = ("--ranks", 2, "--microbatches", 4)


def ran(capsys, *arguments):
    """(exit code, output, errors) of the command."""
    code = 0
    try:
        main([*map(str, arguments)])
    except SystemExit as exited:
        code = exited.code or 0
    written = capsys.readouterr()
    return code, written.out, written.err


def test_a_plan_is_exported_as_it_was_told_when_it_was_made(capsys, tmp_path):
    path, out = tmp_path / "plan.toml", tmp_path / "schedule.csv"
    flags = ("--cluster", "2x RTX 4090", "--rows", 64, "--pipeline-only", "--target", "torchtitan")
    code, planned, _ = ran(capsys, "plan", CONFIG, *flags, "-o", path)
    assert code == 0
    told = planned.split("for torchtitan:\n")[1].rpartition("wrote ")[0]
    code, exported, _ = ran(capsys, "export", path, "--to", "torchtitan")
    assert (code, exported) == (0, told)
    code, _, errors = ran(capsys, "export", path, "--to", "megatron")
    assert code == 0 or "evenflow plan ... --target megatron" in errors
    # For torch, the stages are told beside the order.
    code, shown, _ = ran(capsys, "export", path, "--to", "torch", "-o", out)
    assert code == 0
    assert "stage 0 on rank 0 begins with tokens" in shown
    assert "microbatches of " in shown
    assert parse_schedule(out.read_text(), name="").placement.num_ranks == 2


def test_a_schedule_goes_to_torch_and_comes_back(capsys, tmp_path):
    ours, torchs = tmp_path / "ours.csv", tmp_path / "torchs.csv"
    assert ran(capsys, "schedule", "dualpipe-v", *SIZES, "--save", ours)[0] == 0
    code, shown, _ = ran(capsys, "export", ours, "--to", "torch", "-o", torchs)
    assert (code, shown) == (0, f"wrote {torchs}\n")
    assert "OVERLAP_F_B" in torchs.read_text()
    assert parse_schedule(torchs.read_text(), name="").ranks == get("dualpipe-v")(2, 2, 4).ranks
    code, shown, _ = ran(capsys, "schedule", "--file", torchs)
    assert code == 0
    assert "4 stages on 2 ranks, 4 microbatches" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "mine.csv", "--to", "megatron"), "which says nothing of a model's layers: export a plan"),
        (("export", "none.csv", "--to", "torch"), "cannot read the schedule none.csv"),
        (("export", "none.toml", "--to", "torch"), "cannot read the plan none.toml"),
        (
            ("export", "mine.csv", "--to", "torch", "-o", "mine.csv"),
            "it exists; name another file, or remove it first",
        ),
        (
            ("export", "sends.csv", "--to", "torch"),
            "column 2: '0SEND_F0' is communication of torch's",
        ),
        (
            ("export", "forward.csv", "--to", "torch", "-o", "new.csv"),
            "cannot be run by torch.distributed.pipelining: it has no backward",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("0F0,0B0\n1F0,1B0\n")
    (tmp_path / "forward.csv").write_text("0F0\n1F0\n")
    (tmp_path / "sends.csv").write_text("0F0,0SEND_F0,0B0\n1F0,1B0\n")
    code, _, errors = ran(capsys, *arguments)
    assert code == 2
    assert message in errors.replace("\n", " ")
    assert not (tmp_path / "new.csv").exists()


def test_a_file_that_cannot_be_written_is_told(capsys, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("0F0,0B0\n1F0,1B0\n")
    monkeypatch.setattr("os.fsync", full)
    code, _, errors = ran(capsys, "export", "mine.csv", "--to", "torch", "-o", "out.csv")
    assert (code, errors) == (2, "error: cannot write out.csv: No space left on device; name another file\n")
