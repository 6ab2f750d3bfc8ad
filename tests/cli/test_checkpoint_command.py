"""`evenflow checkpoint`: what is listed, verified, exported and imported."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import evenflow
from evenflow.checkpoint.load import open_checkpoint
from evenflow.cli.main import main
from unsplit import mean_square, mlp, regression, sgd

OWN = """
import torch
from unsplit import mean_square, mlp, regression

def build():
    torch.manual_seed(9)
    return mlp(4, 8, 8, 8, 1), mean_square, regression()
"""


def ran(capfd, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in arguments])
    return left.value.code, *capfd.readouterr()


def make(model: nn.Module, **options):
    options = {"loss": mean_square, "example": regression(), "stages": 2, "num_microbatches": 2} | options
    return evenflow.pipeline(model, optimizer=sgd, device="cpu", **options)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder of three checkpoints, and the file of the function that makes their model."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    (tmp_path / "own.py").write_text(OWN)
    with evenflow.Checkpoints(make(mlp(4, 8, 8, 8, 1)), tmp_path / "checkpoints", every=1) as checkpoints:
        for _ in range(3):
            checkpoints.pipe.step(regression())
            checkpoints.updated()
    return tmp_path


def test_ls(place, capfd):
    code, said, _ = ran(capfd, "checkpoint", "ls", place)
    assert code == 0
    rows = [line for line in said.splitlines() if "step-0000000" in line]
    assert [row.split("│")[2].strip() for row in rows] == ["1", "2", "3"]
    assert "2 stages on 2 ranks" in rows[0]
    (place / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    code, said, _ = ran(capfd, "checkpoint", "ls", place / "checkpoints")
    assert "is of version None" in said
    code, _, said = ran(capfd, "checkpoint", "ls", place / "none")
    assert (code, "holds no checkpoints" in said) == (2, True)


def test_verify(place, capfd):
    code, said, _ = ran(capfd, "checkpoint", "verify", place)
    assert code == 0
    assert "step-00000003: " in said.replace("\n", "")
    assert said.strip().endswith(": whole")
    path = place / "checkpoints" / "step-00000003" / "tensors-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    code, said, _ = ran(capfd, "checkpoint", "verify", place)
    assert code == 1
    assert "in tensors-00000.safetensors is damaged: its checksum is another" in said
    code, said, _ = ran(capfd, "checkpoint", "verify", place / "checkpoints" / "step-00000002")
    assert code == 0


def test_export_and_import_of_an_own_model(place, capfd, tmp_path):
    source = f"{place / 'own.py'}:build"
    code, _, said = ran(capfd, "checkpoint", "export", place, place / "exported")
    assert (code, "of which model is it?" in said) == (2, True)
    code, _, _ = ran(capfd, "checkpoint", "export", place, place / "exported", source)
    assert code == 0
    code, said, _ = ran(capfd, "checkpoint", "import", place / "exported", place / "imported", source)
    assert code == 0
    pipe, expected = make(mlp(4, 8, 8, 8, 1)), make(mlp(4, 8, 8, 8, 1), stages=1)
    pipe.load(place / "imported")
    expected.load(place / "checkpoints" / "step-00000003", optimizer=False)
    assert pipe.num_updates == 0
    assert float(pipe.step(regression()).loss) == float(expected.step(regression()).loss)
    code, _, said = ran(capfd, "checkpoint", "import", place / "exported", place / "imported", source)
    assert (code, "is there already" in said) == (2, True)
    code, _, said = ran(capfd, "checkpoint", "export", place, place / "checkpoints", source)
    assert (code, "name another folder" in said) == (2, True)


def test_a_run_begins_with_weights_that_were_imported(place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    source = f"{place / 'own.py'}:build"
    (place / "run" / "checkpoints").mkdir(parents=True)
    ran(capfd, "checkpoint", "export", place, place / "exported", source)
    first = place / "run" / "checkpoints" / "step-00000000"
    code, _, _ = ran(capfd, "checkpoint", "import", place / "exported", first, source)
    assert code == 0
    run = ("train", source, "--steps", 1, "--stages", 1, "--save-every", 1, "--resume", place / "run")
    code, said, _ = ran(capfd, *run)
    assert (code, f"going on from {first}" in said.replace("\n", " "), "done: " in said) == (0, True, True)


def test_export_of_a_hugging_face_model(place, capfd):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.save_pretrained(place / "base")
    batch = {"input_ids": torch.arange(32).view(4, 8), "labels": torch.arange(32).view(4, 8)}
    pipe = make(model, loss=lambda model, batch: model(**batch).loss, example=batch)
    pipe.step(batch)
    pipe.save(place / "saved")
    code, _, _ = ran(capfd, "checkpoint", "export", place / "saved", place / "out", "--model", place / "base")
    assert code == 0
    again = transformers.LlamaForCausalLM.from_pretrained(place / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    code, _, _ = ran(
        capfd, "checkpoint", "import", place / "out", place / "imported", "--model", place / "base"
    )
    assert code == 0
    imported, saved = (open_checkpoint(place / name) for name in ("imported", "saved"))
    names = [name for name in saved.table if name.startswith("model.")]
    assert list(imported.table) == names
    for name, tensor in imported.tensors().items():
        assert torch.equal(tensor, saved.tensors([name])[name])
    code, _, said = ran(capfd, "checkpoint", "export", place, place / "other", "--model", place / "base")
    assert code == 2
    assert "missing from it" in said
