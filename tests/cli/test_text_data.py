"""Text data: what is read, how it is split, that batches depend on the seed alone, and every refusal."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenflow.cli.text import (
    bytes_as_tokens,
    held_out_batches,
    make_corpus,
    read_text,
    training_batches,
)
from evenflow.errors import ConfigError


def corpus_of(text, length=4, held_out=0.5):
    return make_corpus(text, tokenize=bytes_as_tokens, held_out=held_out, length=length)


def test_the_default_text_is_pythons_documentation():
    text = read_text([])
    assert len(text) > 300_000
    assert b"The standard type hierarchy" in text


def test_files_and_folders_are_read_in_order_and_hidden_ones_left_out(tmp_path: Path):
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_bytes(b"second")
    (folder / "a.txt").write_bytes(b"first")
    (folder / "inner" / "c.txt").write_bytes(b"third")
    (folder / ".hidden").write_bytes(b"no")
    (folder / ".git" / "config").write_bytes(b"no")
    single = tmp_path / "single.txt"
    single.write_bytes(b"zeroth")
    assert read_text([single, folder]) == b"zeroth\nfirst\nsecond\nthird"


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path):
    folder = tmp_path / ".texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"first")
    assert read_text([folder]) == b"first"


def test_a_missing_path_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data path .*nothing\.txt does not exist"):
        read_text([tmp_path / "nothing.txt"])


def test_a_folder_without_files_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data folder .* holds no files"):
        read_text([tmp_path])


def test_empty_files_are_named(tmp_path: Path):
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b" \n")
    with pytest.raises(ConfigError, match=r"the data is empty: there is no text in .*empty\.txt"):
        read_text([empty])


def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"text")

    # File modes do not stop the superuser, as whom tests may run.
    def refuse(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"cannot read the data file .*secret\.txt: Permission denied"):
        read_text([secret])


def test_a_python_without_its_documentation_is_told_of_data(monkeypatch: pytest.MonkeyPatch):
    def without(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ConfigError, match=r"pydoc_data.*--data FILE_OR_FOLDER"):
        read_text([])


def test_too_short_a_text_says_how_much_is_needed():
    with pytest.raises(ConfigError, match=r"held-out part of its 20 bytes has 2 tokens.* takes 8.*--data"):
        corpus_of(b"x" * 20, length=8, held_out=0.1)
    with pytest.raises(ConfigError, match=r"training part of its 4 bytes has 2 tokens"):
        corpus_of(b"abcd", length=3)


def test_the_held_out_part_is_the_end_of_the_text():
    corpus = corpus_of(b"aaaaaaaabb" * 1, length=2, held_out=0.2)
    assert bytes(corpus.training.tolist()) == b"aaaaaaaa"
    assert bytes(corpus.held_out.tolist()) == b"bb"


def test_bytes_per_token_counts_the_held_out_part():
    def pairs(text):
        return torch.arange(len(text) // 2)

    assert make_corpus(b"x" * 40, tokenize=pairs, held_out=0.5, length=4).bytes_per_token == 2.0


def test_batches_are_int64_windows_whose_labels_are_the_inputs():
    corpus = corpus_of(bytes(range(200)), length=8)
    (batch,) = training_batches(corpus, batch_size=3, length=8, seed=0, num_batches=1)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == (3, 8)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
    # Consecutive bytes of the text: each row counts up.
    assert torch.equal(batch["input_ids"].diff(dim=1), torch.ones(3, 7, dtype=torch.int64))


def test_batches_depend_on_the_seed_alone():
    corpus = corpus_of(bytes(range(200)), length=8)

    def windows(seed):
        return [
            batch["input_ids"].tolist()
            for batch in training_batches(corpus, batch_size=3, length=8, seed=seed, num_batches=4)
        ]

    first = windows(5)
    torch.rand(7)
    assert windows(5) == first
    assert windows(6) != first


@given(num_bytes=st.integers(20, 3000), length=st.integers(2, 10), batch_size=st.integers(1, 9))
def test_held_out_batches_are_full_and_reach_both_ends(num_bytes, length, batch_size):
    corpus = corpus_of(bytes(i % 256 for i in range(num_bytes)), length=length)
    batches = held_out_batches(corpus, batch_size=batch_size, length=length)
    assert all(batch["input_ids"].shape == (batch_size, length) for batch in batches)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(rows[0], corpus.held_out[:length])
    if len(rows) > 1:
        assert torch.equal(rows[-1], corpus.held_out[-length:])


def test_every_training_window_can_be_drawn():
    corpus = corpus_of(b"abcdefgh", length=3, held_out=0.5)
    drawn = {
        bytes(row.tolist())
        for batch in training_batches(corpus, batch_size=4, length=3, seed=0, num_batches=20)
        for row in batch["input_ids"]
    }
    assert drawn == {b"abc", b"bcd"}
