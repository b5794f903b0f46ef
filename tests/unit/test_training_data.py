"""Text to train on: what names it, how it is packed, and that it is packed once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy
import pytest
import tools
from tokenizers import normalizers

from post_training.common.errors import UsageError
from post_training.data import conversation_data, text_data
from post_training.data.sources import DATASET, FILES, TextSource

LENGTH = 96


@pytest.fixture(params=[conversation_data, text_data], ids=["conversations", "text"])
def kind(request):
    return request.param


@pytest.fixture
def source(kind, tmp_path):
    write = tools.write_conversations if kind is conversation_data else tools.write_texts
    return TextSource("", (str(write(tmp_path / "data.jsonl", 300)),))


def prepare(kind, source, folder, length=LENGTH):
    return kind.prepare(source, tools.chat_tokenizer(), length, 20, folder)


def test_parts_have_full_rows_and_a_mask(kind, source, tmp_path):
    kind.check(source)
    parts, content = prepare(kind, source, tmp_path / "packed")
    train = parts["train"]
    assert len(train) == content["sequences"] > 0
    assert len(parts["valid"]) == content["held_out_sequences"] > 0
    batch = train.batch([0, 1])
    assert batch["input_ids"].shape == batch["loss_mask"].shape == (2, LENGTH)
    share = numpy.asarray(train.mask).mean()
    assert share == 1 if kind is text_data else 0 < share < 1
    assert f"{content['sequences']:,} sequences" in kind.describe(content)


def test_a_second_run_reads_what_the_first_packed(kind, source, tmp_path):
    _, first = prepare(kind, source, tmp_path)
    (description,) = tmp_path.glob("*/data.json")
    description.write_text(json.dumps({**json.loads(description.read_text()), "marked": True}))
    _, again = prepare(kind, source, tmp_path)
    assert again.pop("marked")
    assert again == first


def test_another_length_file_or_tokenizer_is_packed_anew(kind, source, tmp_path):
    prepare(kind, source, tmp_path)
    prepare(kind, source, tmp_path, length=LENGTH // 2)
    file = Path(source.files[0])
    times = file.stat()
    file.write_text(file.read_text().replace("1", "7"))  # of the same size
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare(kind, source, tmp_path)
    other = tools.chat_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    kind.prepare(source, other, LENGTH, 20, tmp_path)
    assert len(list(tmp_path.glob("*/data.json"))) == 4


@pytest.mark.parametrize("damage", ["a bit", "cut short", "no description"])
def test_packed_data_that_is_damaged_is_packed_again(kind, source, tmp_path, damage, caplog):
    _, first = prepare(kind, source, tmp_path)
    (description,) = tmp_path.glob("*/data.json")
    ids = description.with_name("train_ids.npy")
    content = ids.read_bytes()
    if damage == "a bit":
        ids.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    elif damage == "cut short":
        ids.write_bytes(content[: len(content) // 2])
    else:
        description.write_text("[1]")
    _, again = prepare(kind, source, tmp_path)
    assert again == first
    assert ids.read_bytes() == content
    assert "packed again" in caplog.text


def test_the_files_that_were_read_are_recorded_and_may_not_change_meanwhile(
    kind, source, tmp_path, monkeypatch
):
    _, content = prepare(kind, source, tmp_path)
    file = Path(source.files[0])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert content["read"] == [{"role": "data", "path": str(file), "sha256": digest}]
    read = kind._pack

    def replaced(*given):
        found = read(*given)
        file.write_text(file.read_text() * 3)
        return found

    monkeypatch.setattr(kind, "_pack", replaced)
    with pytest.raises(UsageError, match="replaced while it was read"):
        prepare(kind, source, tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_no_data_is_refused_by_name(kind):
    with pytest.raises(UsageError, match=f"{DATASET}\n  cause: no data to train on"):
        kind.check(TextSource(""))


def test_data_too_short_for_one_sequence_is_refused_and_leaves_nothing(kind, tmp_path):
    write = tools.write_conversations if kind is conversation_data else tools.write_texts
    source = TextSource("", (str(write(tmp_path / "data.jsonl", 1)),))
    with pytest.raises(UsageError, match="--seq-length"):
        prepare(kind, source, tmp_path / "packed", length=10 if kind is conversation_data else 9999)
    assert not (tmp_path / "packed").exists()


def test_local_paths_come_with_the_option_that_named_them(tmp_path):
    path = str(tmp_path)
    assert TextSource(path).local == [(path, DATASET)]
    assert TextSource("", ("a.jsonl",)).local == [("a.jsonl", FILES)]
    assert TextSource("org/name", ("./a.jsonl",)).local == [("./a.jsonl", FILES)]
    assert TextSource("org/name", ("train",)).local == []
    assert TextSource("org/name").describe() == "org/name"
