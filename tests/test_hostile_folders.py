"""Folders of weights from strangers: nothing in them runs, and what is broken is refused by name."""

import json
import os
import pickle
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import save_file

import evenflow
from damage import Digits, damaged_bytes, damaged_tree
from evenflow.cli.config import FolderModel
from evenflow.cli.source import build
from evenflow.errors import EvenflowError
from folders import refused
from hostile_runs import assert_is_told_well, batch, bounded, each_of, net
from unsplit import mean_square, sgd


def load(folder: Path) -> None:
    """Fill the small model from a folder, and let it go."""
    evenflow.pipeline(
        net(), loss=mean_square, example=batch(), optimizer=sgd, stages=2, device="cpu", load=folder
    ).close()


# -- safetensors


def parts(whole: bytes) -> tuple[dict, bytes]:
    """The header of a file, and what follows."""
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = json.dumps(header, default=str).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    made.mkdir()
    save_file(net().state_dict(), made / "model.safetensors")
    return made


def test_of_damaged_safetensors_none_crashes_or_fills_the_memory(folder):
    path, ends = folder / "model.safetensors", Counter()
    whole = path.read_bytes()
    header, data = parts(whole)

    damages = st.one_of(damaged_bytes(whole), damaged_tree(header).map(lambda tree: joined(tree, data)))

    def check(drawn: st.DataObject) -> None:
        path.write_bytes(drawn.draw(damages))
        with bounded():
            try:
                load(folder)
                ends["loaded"] += 1
            except EvenflowError as error:
                assert_is_told_well(error, folder)
                ends["refused"] += 1

    each_of(200, check)
    assert min(ends["loaded"], ends["refused"]) > 5, ends


def entry(shape: list[int], end: int, *, dtype: str = "F64", begin: int = 0) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        (
            struct.pack("<Q", 2**62) + b"{}",
            "cannot be read: Error while deserializing header: header too large",
        ),
        (struct.pack("<Q", 10**7) + b"{}", "cannot be read: Error while deserializing header"),
        (b"", "cannot be read: Error while deserializing header: header too small"),
        (joined({"0.weight": entry([10**15], 8)}, b"\0" * 8), "cannot be read: Error while deserializing"),
        (joined({"0.weight": entry([2**60, 0, 2**60], 0)}, b""), "has more elements than can be counted"),
        (joined({"0.weight": entry([2**64 - 1, 0], 0)}, b""), "has more elements than can be counted"),
        (joined({"0.weight": entry([2], 16, dtype="F7")}, b"\0" * 16), "unknown variant `F7`"),
        (
            b"\x3d" + b"\0" * 7 + b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":null}',
            "model.safetensors cannot be read",
        ),
    ],
)
def test_a_header_that_promises_what_is_not_there(folder, whole, said):
    (folder / "model.safetensors").write_bytes(whole)
    with bounded(), refused(said):
        load(folder)


def test_a_key_that_a_header_has_twice(folder):
    one = json.dumps({"0.weight": entry([1], 8)})[1:-1].encode()
    text = b"{" + one + b"," + one + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with refused("model.safetensors cannot be read: its header names '0.weight' twice"):
        load(folder)


def test_codes_are_not_read_as_weights(folder):
    state = net().state_dict()
    save_file(state | {"0.weight": state["0.weight"].to(torch.int8)}, folder / "model.safetensors")
    with refused("1 of whole numbers, flags or codes in the place of weights: '0.weight' for 0.weight"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\0b", 5, ["a"]]
)
def test_an_index_that_leads_out_of_the_folder(folder, name):
    (folder.parent / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(net().state_dict(), "model.safetensors") | {"0.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused("which is no file in the folder") as told:
        load(folder)
    assert_is_told_well(told.value, folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": ' + "9" * 5000 + "}", "{}", "[]", "\0"])
def test_an_index_that_is_none(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with bounded(), refused("model.safetensors.index.json") as told:
        load(folder)
    assert_is_told_well(told.value, folder)


# -- Hugging Face folders, as `evenflow train --model` takes them


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder of a small Llama, without weights."""
    transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def configure(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def llama(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["torch", "pickle", "shards"])
def test_code_in_pickled_weights_does_not_run(hub, tmp_path, kind):
    marker, state = tmp_path / "ran", llama(hub).state_dict()
    name = "pytorch_model-00001-of-00001.bin" if kind == "shards" else "pytorch_model.bin"
    if kind == "pickle":
        (hub / name).write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    else:
        torch.save(state | {"model.norm.weight": Bomb(marker)}, hub / name)
    if kind == "shards":
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
        (hub / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with refused("its pickled weights (*.bin) hold more than tensors, which is never run"):
        build(FolderModel(hub), seed=0)
    with refused("the folder holds no *.safetensors"):
        load(hub)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb is a live one"


def test_pickled_tensors_alone_are_read(hub):
    state = llama(hub).state_dict()
    torch.save(state, hub / "pytorch_model.bin")
    model = build(FolderModel(hub), seed=0).model
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_code_of_a_folder_does_not_run(hub, tmp_path, kind):
    marker = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    (hub / "own.py").write_text(code)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    configure(hub, auto_map=own, model_type=kind)
    (hub / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.T", None]}}))
    with refused(str(hub)):
        build(FolderModel(hub), seed=0).tokenize(b"text")
    assert not marker.exists()


def test_an_index_of_pickled_weights_stays_in_the_folder(hub, tmp_path):
    state = llama(hub).state_dict()
    torch.save(state, tmp_path / "outside.bin")
    torch.save(state, hub / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "../outside.bin")}
    (hub / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with refused("names '../outside.bin', which is no file in the folder"):
        build(FolderModel(hub), seed=0)


def test_an_adapter_s_folder_leads_nowhere(hub):
    (hub / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    with refused(f"{hub} holds an adapter to another model"):
        build(FolderModel(hub), seed=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 10**12}, "asks for a model of 116.4 TiB in float32, and this machine has"),
        ({"num_hidden_layers": 10**9}, "asks for a model of 1000000000 layers; at most 10000 are built"),
        ({"hidden_size": -16}, "cannot load a causal language model"),
        ({"hidden_size": "much"}, "cannot load a causal language model"),
        ({"num_attention_heads": 0}, "cannot load a causal language model"),
        ({"hidden_act": "\x1b[31m"}, "cannot load a causal language model"),
        ({"model_type": ["llama"]}, "cannot load a causal language model"),
    ],
)
def test_a_configuration_that_cannot_be_built(hub, changes, said):
    configure(hub, **changes)
    with bounded(), refused(said):
        build(FolderModel(hub), seed=0)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"vocab_size": ' + Digits("9" * 5000) + "}", "\0", "[1]"]
)
def test_a_configuration_that_is_no_json(hub, text):
    (hub / "config.json").write_text(text)
    with bounded(), refused("cannot load a causal language model"):
        build(FolderModel(hub), seed=0)


def test_weights_that_break_off(hub):
    llama(hub).save_pretrained(hub)
    path = hub / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with refused("model.safetensors cannot be read"):
        build(FolderModel(hub), seed=0)


def test_a_tokenizer_that_is_none(hub):
    (hub / "tokenizer.json").write_text("{" * 100)
    with refused("cannot load a tokenizer"):
        build(FolderModel(hub), seed=0).tokenize(b"text")
