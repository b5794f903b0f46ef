"""Calibration data: every source form, exact packing, and errors that name the place."""

import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tools import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from post_training import portable
from post_training.common import limits
from post_training.common.errors import UsageError
from post_training.data import (
    calibration_data,
    chat_templates,
    document_formats,
    parquet,
    records,
    sources,
)

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def templated(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each byte, and an end-of-text token: counts can be done by hand."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return templated()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(source: Path) -> list[str]:
    return [document.text for document in sources.read_documents(str(source))]


def test_documents_are_packed_without_gaps_with_end_of_text_between(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "defg"}, {"text": "hi"}])
    packed = calibration_data.load_calibration_data(
        str(path), tokenizer, calib_size=2, sequence_length=5
    )
    assert [tokenizer.decode(row) for row in packed.input_ids] == [
        "abc<|endoftext|>d",
        "efg<|endoftext|>h",
    ]
    assert packed.input_ids.dtype == torch.long
    assert (packed.documents, packed.tokens, packed.notes) == (3, 10, ())


def test_documents_beyond_the_last_full_sequence_are_not_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcde"}, {"text": "x"}, {"text": "y"}])
    packed = calibration_data.load_calibration_data(
        str(path), tokenizer, calib_size=9, sequence_length=5
    )
    assert packed.input_ids.shape == (1, 5)
    assert packed.documents == 1
    assert "9 sequences were asked for and the data ended before" in packed.describe()


def test_a_source_shorter_than_one_sequence_gives_one_short_sequence(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "cd"}])
    packed = calibration_data.load_calibration_data(
        str(path), tokenizer, calib_size=4, sequence_length=100
    )
    assert tokenizer.decode(packed.input_ids[0]) == "ab<|endoftext|>cd"
    assert (packed.tokens, packed.documents) == (5, 2)
    assert "shorter than 100 tokens" in packed.describe()


def test_reading_ends_when_there_is_enough(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcdef"}\nthis line is not JSON\n')
    packed = calibration_data.load_calibration_data(
        str(path), tokenizer, calib_size=1, sequence_length=6
    )
    assert packed.tokens == 6


def test_describe_names_what_was_used(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 5000}])
    packed = calibration_data.load_calibration_data(
        str(path), tokenizer, calib_size=2, sequence_length=2000
    )
    assert packed.describe() == (
        f"2 sequences x 2,000 tokens = 4,000 tokens, from 1 document of {path}"
    )


def test_long_texts_tokenized_in_pieces_lose_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration_data, "_PIECE", 64)
    text = " ".join(f"word{i}" for i in range(200))
    path = tmp_path / "long.txt"
    path.write_text(text)
    packed = calibration_data.load_calibration_data(str(path), tokenizer, 1, 10_000)
    assert tokenizer.decode(packed.input_ids[0]) == text


def test_chat_goes_through_the_template(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    packed = calibration_data.load_calibration_data(str(path), tokenizer, 1, 100)
    assert tokenizer.decode(packed.input_ids[0]) == "<user>hi\n<assistant>yo\n"


def test_chat_without_a_template_is_joined_and_said(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    tokenizer = templated(None)
    packed = calibration_data.load_calibration_data(str(path), tokenizer, 1, 100)
    assert tokenizer.decode(packed.input_ids[0]) == "hi\n\nyo"
    assert "no chat template" in packed.describe()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}], "tool_calls": None},
                {"role": "assistant", "content": "a"},
            ]
        },
        {"question": "q", "answer": "a"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
    ],
)
def test_every_conversation_layout_gives_the_same_turns(row):
    document = document_formats.document_of(records.Row("here", row), "--data")
    assert document.messages == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    )


def test_an_instruction_is_followed_by_its_input():
    row = records.Row("here", {"instruction": "Sort.", "input": "b a", "output": "a b"})
    assert document_formats.document_of(row, "--data").messages[0]["content"] == "Sort.\n\nb a"


def test_a_small_parquet_file_that_stands_for_gigabytes_is_refused(tmp_path, monkeypatch):
    """A value that repeats is stored once: 256 of 4 MB in a few kilobytes."""
    monkeypatch.setattr(parquet, "_BYTES", 256 << 20)
    table = pyarrow.table({"text": pyarrow.array(["x" * (4 << 20)] * 256)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(UsageError, match="256 rows from row 1 on") as refused:
        list(records.read(tmp_path / "a.parquet", "--data"))
    assert "memory" in refused.value.cause
    monkeypatch.undo()
    assert len(list(records.read(tmp_path / "a.parquet", "--data"))) == 256


def test_parquet_text_csv_and_jsonl_read_alike(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text\none\ntwo\n")
    for suffix in ("jsonl", "parquet", "csv"):
        assert texts(tmp_path / f"a.{suffix}") == ["one", "two"]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]


def test_files_of_a_folder_take_turns_and_hidden_ones_are_skipped(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a1"}, {"text": "a2"}, {"text": "a3"}])
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "b.jsonl", [{"text": "b1"}])
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "c.jsonl", [{"text": "hidden"}])
    assert texts(tmp_path) == ["a1", "b1", "a2", "a3"]


def test_random_offsets_are_seeded_and_begin_at_words(tmp_path, tokenizer):
    words = [f"w{i:03d}" for i in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": " ".join(words)}] * 4)

    def load(**options):
        packed = calibration_data.load_calibration_data(str(path), tokenizer, 3, 64, **options)
        return tokenizer.decode(packed.input_ids.flatten())

    first = load(random_offset=True, seed=7)
    assert first == load(random_offset=True, seed=7)
    assert first != load(random_offset=True, seed=8)
    assert load().startswith("w000 ")
    assert first.split()[0] in words


def test_every_sequence_belongs_to_one_data_parallel_rank(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcdefghijklmn"}])
    packed = calibration_data.load_calibration_data(str(path), tokenizer, 7, 2)
    shares = [torch.cat(list(packed.batches(2, rank, size=3))) for rank in range(3)]
    assert sorted(len(share) for share in shares) == [2, 2, 3]
    assert sorted(torch.cat(shares).tolist()) == sorted(packed.input_ids.tolist())
    assert [len(batch) for batch in packed.batches(2, rank=0, size=3)] == [2, 1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2"),
        ('{"text": "a"}\n[1, 2]\n', "line 2"),
        ('\n{"body": "a"}\n', "columns: body"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}\n', "unknown role 'wizard'"),
        ('{"messages": [{"from": "gtp", "value": "a"}]}\n', "Did you mean: gpt"),
        ('{"messages": []}\n', "the conversation is empty"),
        ('{"messages": "hello"}\n', "not a list of objects"),
        ('{"messages": [{"role": "user", "content": 3}]}\n', "not text"),
        ("\n\n", "holds no text"),
        ('{"text": "  "}\n', "holds no text"),
    ],
)
def test_malformed_data_is_a_usage_error_that_says_where(tmp_path, tokenizer, content, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match="--calib-dataset-path-or-name") as caught:
        calibration_data.load_calibration_data(str(path), tokenizer, 4, 4)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_template_that_refuses_a_role_is_a_usage_error(tmp_path):
    tokenizer = templated("{{ raise_exception('no system turns') }}")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "system", "content": "s"}]}])
    with pytest.raises(UsageError, match="refuses the roles system: no system turns"):
        calibration_data.load_calibration_data(str(path), tokenizer, 1, 4)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.csv", b'text,more\n"one"\n', "line 2"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.docx", b"x", "names no known format"),
    ],
)
def test_unreadable_files_are_usage_errors(tmp_path, tokenizer, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        calibration_data.load_calibration_data(str(tmp_path / name), tokenizer, 1, 4)


def test_missing_paths_and_empty_folders_are_usage_errors(tmp_path, tokenizer):
    with pytest.raises(UsageError, match="no such file or folder"):
        calibration_data.load_calibration_data(str(tmp_path / "nothing.jsonl"), tokenizer, 1, 4)
    with pytest.raises(UsageError, match="the folder holds no file"):
        calibration_data.load_calibration_data(str(tmp_path), tokenizer, 1, 4)


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("cnn_dailymail", False),
        ("nvidia/Nemotron-Post-Training-Dataset-v2", False),
        ("./data", True),
        ("~/data", True),
        ("a/b/c", True),
        ("train.jsonl", True),
    ],
)
def test_paths_and_hub_names_are_told_apart(source, local):
    assert records.is_local(source) is local


@pytest.mark.parametrize("name", ["cnn_dailymail", "someone/some-set"])
def test_an_unreachable_hub_is_a_usage_error_that_says_how_to_go_on(name, tokenizer, monkeypatch):
    portable.install()  # ModelOpt's list of presets comes with an import of megatron-core
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    for proxy in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(UsageError, match=r"hub.invalid cannot be reached") as caught:
        calibration_data.load_calibration_data(name, tokenizer, 1, 4)
    assert "give a local file or folder instead" in str(caught.value)


def test_a_chat_template_that_takes_all_memory_is_stopped():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'x' * 10000000000 }}"
    document = document_formats.Document(
        "a.jsonl, line 1", messages=({"role": "user", "content": "Hi"},)
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UsageError, match="takes more than 2 GiB"):
        chat_templates.render(document, tokenizer, "--data")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("thread", ["main", "another"])
def test_a_chat_template_that_never_ends_is_stopped(thread, monkeypatch):
    monkeypatch.setattr(limits, "_TEMPLATE_SECONDS", 0.3)
    tokenizer = byte_tokenizer()
    turns = ({"role": "user", "content": "Hi"},)
    document = document_formats.Document("a.jsonl, line 1", messages=turns)
    tokenizer.chat_template = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )

    def refused():
        with pytest.raises(UsageError, match=r"more than 0\.3 seconds of computing"):
            chat_templates.render(document, tokenizer, "--x")
        return True

    if thread == "another":
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(refused).result()
    else:
        assert refused()
        # Arithmetic of long integers runs no instruction of Python's for minutes.
        tokenizer.chat_template = "{{ (3 ** 99999999) % 7 }}"
        assert refused()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    time.sleep(0.7)  # nothing arrives late
    assert chat_templates.render(document, tokenizer, "--x") == "Hi"
