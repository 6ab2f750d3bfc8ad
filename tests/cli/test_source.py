"""Where a model comes from: both forms of a reference, a Hugging Face folder, and every refusal."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import evenflow
from evenflow.cli.config import FolderModel, FunctionModel
from evenflow.cli.source import build, find_function
from evenflow.errors import ConfigError

GPT = f"{Path(__file__).parents[2] / 'examples' / 'gpt.py'}:build"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file of Python, and forget it and its folder afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "source", raising=False)

    def write_file(text):
        path = tmp_path / "source.py"
        path.write_text("import torch\nfrom torch import nn\n" + text, encoding="utf-8")
        return path

    return write_file


def test_the_gpt_is_built_the_same_every_time():
    first = build(FunctionModel(GPT, {"width": 32, "num_layers": 1}), seed=3)
    torch.rand(5)
    second = build(FunctionModel(GPT, {"width": 32, "num_layers": 1}), seed=3)
    other = build(FunctionModel(GPT, {"width": 32, "num_layers": 1}), seed=4)
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert not all(map(torch.equal, first.model.parameters(), other.model.parameters()))
    assert first.example["input_ids"].shape == (16, 128)


def test_the_gpt_starts_from_a_guess_and_never_looks_ahead():
    source = build(FunctionModel(GPT, {"width": 32, "num_layers": 2, "length": 16}), seed=0)
    source.model.eval()
    loss = source.loss(source.model, source.example)
    assert abs(loss.item() - 5.545) < 0.1
    tokens = source.example["input_ids"]
    changed = tokens.clone()
    changed[:, 9:] += 1
    changed %= 256
    before, after = source.model(tokens).logits, source.model(changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_gpt_refuses_more_positions_than_it_has():
    source = build(FunctionModel(GPT, {"length": 16}), seed=0)
    with pytest.raises(ValueError, match="17 positions, but this GPT has max_length=16"):
        source.model(torch.zeros(1, 17, dtype=torch.int64))


def test_a_module_of_the_current_folder_can_be_named(write, monkeypatch):
    path = write("def make(): return nn.Linear(1, 1), lambda model, x: model(x).sum(), torch.ones(2, 1)")
    monkeypatch.chdir(path.parent)
    assert isinstance(build(FunctionModel("source:make"), seed=0).model, nn.Linear)


def test_a_file_can_import_its_neighbour(write, tmp_path):
    (tmp_path / "neighbour_of_source.py").write_text("width = 7")
    path = write("from neighbour_of_source import width\ndef make(): return width")
    assert find_function(f"{path}:make")() == 7


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gpt", "'gpt' names no model: give a CONFIG.toml, MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("gpt:", "'gpt:' names no model"),
        (":build", "':build' names no model"),
        ("no_such_package_here:build", "there is no module 'no_such_package_here'"),
        ("nowhere/gpt.py:build", "there is no file nowhere/gpt.py to take a model from"),
        ("math:sqr", "math has no function 'sqr'; did you mean sqrt"),
        ("math:zzzz", "math has no function 'zzzz'"),
        ("math:pi", "pi is a float, not a function"),
    ],
)
def test_a_reference_that_leads_nowhere_says_so(reference, message):
    with pytest.raises(ConfigError) as caught:
        find_function(reference)
    assert message in str(caught.value)


def test_a_module_that_fails_is_quoted(write):
    path = write("raise RuntimeError('out of luck')")
    with pytest.raises(ConfigError, match=r"importing .*source\.py failed: RuntimeError: out of luck"):
        find_function(f"{path}:make")


def test_a_missing_import_of_the_module_is_quoted(write, monkeypatch):
    path = write("import no_such_package_here")
    monkeypatch.chdir(path.parent)
    with pytest.raises(ConfigError, match="importing source failed: No module named 'no_such_package_here'"):
        find_function("source:make")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("return nn.Linear(1, 1)", "Linear"),
        ("return nn.Linear(1, 1), torch.ones(1)", "(Linear, Tensor)"),
        ("return nn.Linear(1, 1), 3, torch.ones(1)", "(Linear, int, Tensor)"),
        ("return 1, print, 2", "(int, builtin_function_or_method, int)"),
    ],
)
def test_a_function_that_returns_something_else_is_told_what_to_return(write, body, found):
    path = write(f"def make(): {body}")
    with pytest.raises(ConfigError) as caught:
        build(FunctionModel(f"{path}:make"), seed=0)
    assert f"returned {found}: it must return (model, loss function, example batch)" in str(caught.value)


def test_wrong_arguments_are_the_configurations_fault(write):
    path = write("def make(*, width): return width")
    with pytest.raises(ConfigError, match=r"cannot be called with \{'widht': 3\}: .*unexpected keyword"):
        build(FunctionModel(f"{path}:make", {"widht": 3}), seed=0)


def test_a_type_error_inside_the_function_is_its_own(write):
    path = write("def make(): return 1 + 'a'")
    with pytest.raises(TypeError, match="unsupported operand"):
        build(FunctionModel(f"{path}:make"), seed=0)


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"is no Hugging Face model folder: it holds no config\.json"):
        build(FolderModel(tmp_path), seed=0)


def test_without_transformers_a_folder_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'evenflow\[hf\]'"):
        build(FolderModel(tmp_path), seed=0)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer of words, and no weights."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hf") / "tiny-llama"
    words = {word: number for number, word in enumerate(["[UNK]", "to", "be", "or", "not"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        folder
    )
    transformers.LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    return folder


def test_a_folder_without_weights_is_built_from_its_config(tiny_llama):
    source = build(FolderModel(tiny_llama), seed=0)
    assert source.tokenize(b"to be or not to be").tolist() == [1, 2, 3, 4, 1, 2]
    assert source.tokenize(b"to be\xff").tolist() == [1, 2]
    assert source.loss(source.model, source.example).ndim == 0
    assert not source.model.config.use_cache


def test_a_folder_with_weights_gives_them(tiny_llama, tmp_path):
    import transformers

    folder = tmp_path / "trained"
    first = build(FolderModel(tiny_llama), seed=1).model
    first.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    second = build(FolderModel(folder), seed=2).model
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    with evenflow.deferred_init():  # to plan with, nothing is read
        third = build(FolderModel(folder), seed=2, loads=False).model
    assert {parameter.dtype for parameter in third.parameters()} == {torch.float32}
    assert all(parameter.is_meta for parameter in third.parameters())


def test_text_that_is_no_text_is_refused_where_a_tokenizer_reads_it(tiny_llama):
    source = build(FolderModel(tiny_llama), seed=0)
    with pytest.raises(ConfigError, match=r"the text is not UTF-8, which the tokenizer of .* needs"):
        source.tokenize(bytes(range(128, 256)) * 4)


def test_a_folder_with_a_config_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load a causal language model from"):
        build(FolderModel(tmp_path), seed=0)
