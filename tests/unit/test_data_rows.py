"""Nothing of a row is lost without a word: layouts, columns, and what files can hold."""

from __future__ import annotations

import datetime
import decimal
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
from model_folders import write_model

from post_training.checkpoints import model_folders as checked_folders
from post_training.common import files, forms, safetensors_index
from post_training.common.errors import UsageError
from post_training.data import document_formats, prompts, records, sources
from post_training.data.records import Row


def turns(**row: object) -> list[tuple[str, str]]:
    document = document_formats.document_of(Row("here", row), "--data")
    return [(each["role"], each["content"]) for each in document.messages]


HI = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": HI, "system": "Be brief."}, [("system", "Be brief.")]),
        ({"conversations": HI, "history": [["a", "b"]]}, [("user", "a"), ("assistant", "b")]),
        ({"conversations": HI, "history": '[["a", "b"]]', "system": None},
         [("user", "a"), ("assistant", "b")]),
        # What was before comes after the system turn of the conversation itself.
        ({"conversations": [{"from": "system", "value": "Be."}, *HI], "history": [["a", "b"]]},
         [("system", "Be."), ("user", "a"), ("assistant", "b")]),
    ],
)  # fmt: skip
def test_columns_that_go_with_a_conversation_are_part_of_it(row, expected):
    assert turns(**row) == [*expected, ("user", "hi"), ("assistant", "yo")]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Sum up", "context": "KOALAS", "response": "Leaves."}, "Sum up\n\nKOALAS"),
        ({"instruction": "Sum up", "context": "", "response": "Leaves."}, "Sum up"),
        ({"question": "What?", "context": "KOALAS", "answer": "Leaves."}, "What?\n\nKOALAS"),
        # As Alpaca is published: the whole prompt is there as text too.
        ({"instruction": "Sum", "input": "KOALAS", "output": "Leaves.", "text": "Below is ..."},
         "Sum\n\nKOALAS"),
    ],
)  # fmt: skip
def test_what_a_question_is_about_follows_it(row, asked):
    assert turns(**row) == [("user", asked), ("assistant", "Leaves.")]


@pytest.mark.parametrize(
    ("row", "expected", "unused"),
    [
        # Alpaca's rows without answers.
        ({"instruction": "Sum up", "input": "KOALAS"}, ["Sum up\n\nKOALAS"], ()),
        ({"prompt": "Who?", "system": "Be brief.", "id": 7}, ["Be brief.", "Who?"], ()),
        ({"question": "Who?", "context": "KOALAS", "level": 3}, ["Who?\n\nKOALAS"], ("level",)),
        ({"prompt": ["a", "b"], "history": [["c", "d"]]}, ["c", "a", "b"], ()),
        ({"question": "Who?", "answer": "I", "system": "Be."}, ["Be.", "Who?"], ()),
        ({"messages": [{"role": "user", "content": "a"}], "score": 1}, ["a"], ("score",)),
        ({"text": "Once", "source": "x"}, ["Once"], ("source",)),
    ],
)  # fmt: skip
def test_columns_that_go_with_a_question_are_part_of_what_is_answered(
    row, expected, unused, tmp_path
):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({**row, "tools": [{"name": "f"}]} if "text" not in row else row))
    found = prompts.load(str(path), "--prompts-path")
    [dialogue] = found.dialogues
    assert [each["content"] for each in dialogue.messages] == expected
    assert dialogue.unused == unused
    assert dialogue.tools == (({"name": "f"},) if "text" not in row else ())
    assert all(f"{name} (1 rows)" in found.describe() for name in unused)


def test_a_system_column_beside_another_system_turn_is_named():
    messages = [{"role": "system", "content": "One"}, {"role": "user", "content": "a"}]
    row = Row("here", {"messages": messages, "system": "Two"})
    assert document_formats.document_of(row, "--data").unused == ("system",)


def test_of_two_layouts_in_a_turn_the_one_with_values_counts():
    messages = [
        {"from": "human", "role": None, "content": None, "value": "q"},
        {"role": "assistant", "from": None, "content": "a", "value": None},
    ]
    assert turns(messages=messages) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("column", ["tools", "history"])
@pytest.mark.parametrize("value", [True, 7, {"a": 1}, ["a"]])
def test_columns_of_another_type_are_refused(column, value):
    with pytest.raises(UsageError, match=f"its {column} (is|are) no list of"):
        turns(conversations=HI, **{column: value})


def test_a_history_of_another_form_is_refused():
    for history in (["a", "b"], [["a", None]]):  # an answer that is null is no "None"
        with pytest.raises(UsageError, match="no list of pairs"):
            turns(conversations=HI, history=history)


def test_the_log_says_which_columns_are_not_used(tmp_path, caplog):
    rows = [{"text": "a", "id": 1, "note": None}, {"text": "b", "id": 2, "note": "x"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logging.getLogger("post_training").propagate = True
    with caplog.at_level(logging.INFO, "post_training"):
        assert len(list(sources.read_documents(str(path)))) == 2
    assert "not used: id (2 rows), note (1 rows)" in caplog.text


def test_half_of_a_surrogate_pair_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
    read = records.read(path, "--data")
    assert next(read).values["text"] == "whole 😀"
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2") as error:
        next(read)
    assert r"\ud83d" in error.value.cause


def test_half_of_a_surrogate_pair_is_refused_in_files_of_every_kind(tmp_path):
    half = r'{"weight_map": {"model.norm.weight": "\ud800"}}'
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(half)
    with pytest.raises(UsageError, match=r"\\ud800 without its other half \(column 39\)"):
        safetensors_index.read(tmp_path)
    index.write_text(half.replace(": {", ":\n{"))
    with pytest.raises(UsageError, match=r"other half \(line 2\)"):
        files.read_json(index)
    index.write_text(r'{"text": "\ud83d\ude00"}')
    assert files.read_json(index) == {"text": "😀"}
    (tmp_path / "a.yaml").write_text('name: "\\ud800"\n')
    with pytest.raises(UsageError, match="other half"):
        forms.read_yaml(tmp_path / "a.yaml", "recipe", "mend it")


def test_only_line_breaks_end_a_line_of_prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("first\u2028still first\nsecond\x0cpage\r\nthird\x85x\n", newline="")
    found = prompts.load(str(path), "--prompts-path").dialogues
    assert len(found) == 3


def test_a_csv_field_may_be_long(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(next(records.read(path, "--data")).values["text"]) == 300_000


def test_what_parquet_holds_besides_text_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = {
        "messages": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]],
        "at": [datetime.datetime(2026, 1, 2, 3)],
        "cost": [decimal.Decimal("1.50")],
        "raw": [b"caf\xc3\xa9"],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    row = next(records.read(path, "--data"))
    assert json.loads(json.dumps(row.values)) == row.values
    assert (row.values["at"], row.values["cost"], row.values["raw"]) == (
        "2026-01-02 03:00:00",
        "1.50",
        "café",
    )


def test_bytes_that_are_no_text_are_not_made_one(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"caf\xe9"]}), path)
    with pytest.raises(UsageError, match="no column of a known layout holds text"):
        next(sources.read_documents(str(path)))


def test_a_column_of_a_table_has_one_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer,answer\na,b,c\n")
    with pytest.raises(UsageError, match="its header has 'answer' twice"):
        next(records.read(path, "--data"))


def test_the_log_says_which_files_of_a_folder_are_not_read(tmp_path, caplog):
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        (tmp_path / name).write_text('{"text": "a"}')
    logging.getLogger("post_training").propagate = True
    with caplog.at_level(logging.INFO, "post_training"):
        assert records.list_files(tmp_path, "--data") == [tmp_path / "a.jsonl"]
        for name in ("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"):
            (tmp_path / name).write_text('{"text": "a"}')
        assert len(records.list_files(tmp_path, "--data")) == 3
    assert "not read: 2 (b.json, c.jsonl.gz ...)" in caplog.text
    assert f"of the parts of {tmp_path}/train, 1 are missing" in caplog.text


def test_rows_of_an_embedding_that_are_no_tokens_are_told_from_the_header(tmp_path):
    write_model(tmp_path, **{"model.embed_tokens.weight": [515, 64]})
    with pytest.raises(UsageError, match="vocab_size = 512") as error:
        checked_folders.model_folder(tmp_path)
    assert "515 rows" in error.value.cause
