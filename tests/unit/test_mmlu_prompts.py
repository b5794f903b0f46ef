"""MMLU: the published prompt, every layout of the questions, and the statistics."""

import csv
import json
import logging
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from post_training.common.errors import UsageError
from post_training.evaluation import mmlu_data
from post_training.evaluation.mmlu_prompts import (
    Count,
    Question,
    Score,
    prompt,
    score,
    select,
    wilson_interval,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "mmlu"


def question(text: str = "2 + 2?", subject: str = "abstract_algebra", answer: int = 1) -> Question:
    return Question(subject, text, ("3", "4", "5", "6"), answer)


ROWS = [
    {"question": f"q{i}", "subject": s, "choices": ["w", "x", "y", "z"], "answer": i % 4}
    for s in ("law", "art")
    for i in range(3)
]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["question", "subject", *(f"choice{i}" for i in range(4)), "answer"])
            for row in rows:
                writer.writerow([row["question"], row["subject"], *row["choices"], row["answer"]])
    return path


def test_the_prompt_is_the_published_one_letter_by_letter():
    assert prompt(question("3 + 2?"), [question("2 + 2?")]) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n"
        "\n"
        "2 + 2?\n"
        "A. 3\n"
        "B. 4\n"
        "C. 5\n"
        "D. 6\n"
        "Answer: B\n"
        "\n"
        "3 + 2?\n"
        "A. 3\n"
        "B. 4\n"
        "C. 5\n"
        "D. 6\n"
        "Answer:"
    )


def test_without_examples_the_header_comes_right_before_the_question():
    assert prompt(question()).startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n2 +"
    )


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 10), (0.5, 5), (0.41, 5), (0.01, 1)])
def test_a_fraction_takes_the_first_questions_of_each_subject_rounded_up(fraction, expected):
    test = {s: [question(f"{s}{i}", s) for i in range(10)] for s in ("art", "law")}
    chosen = select(test, fraction)
    assert [q.question for q in chosen] == [f"{s}{i}" for s in test for i in range(expected)]


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)
def test_the_interval_is_wilsons(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


def test_the_interval_of_mmlu_is_as_wide_as_known():
    low, high = wilson_interval(9800, 14042)
    assert (high - low) / 2 == pytest.approx(0.0076, abs=2e-4)


def test_scores_average_over_questions_and_over_subjects():
    asked = [question("a", "art", 0)] * 3 + [question("b", "law", 2)]
    result = score(asked, [0, 0, 1, 2])
    assert result.subjects == {"art": Count(2, 3), "law": Count(1, 1)}
    assert result.total == Count(3, 4)
    assert result.macro == pytest.approx((2 / 3 + 1) / 2)
    report = json.loads(json.dumps(result.to_json()))
    assert report["accuracy"] == 0.75
    assert report["subjects"]["law"]["total"] == 1
    assert report["interval_95"] == list(wilson_interval(3, 4))


def test_an_empty_count_has_no_accuracy():
    assert math.isnan(Count(0, 0).accuracy)
    assert Score({}).total == Count(0, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_folder_of_dev_and_test_files_is_read(tmp_path, suffix):
    write(tmp_path / f"test{suffix}", ROWS)
    write(tmp_path / f"dev{suffix}", ROWS)
    benchmark = mmlu_data.load(str(tmp_path), few_shots=3)
    assert list(benchmark.test) == ["art", "law"]
    assert benchmark.test["art"][2] == Question("art", "q2", ("w", "x", "y", "z"), 2)
    assert [q.question for q in benchmark.dev["law"]] == ["q0", "q1", "q2"]


def test_a_clone_of_the_hubs_folder_is_read(tmp_path):
    write(tmp_path / "all" / "test-00000-of-00002.parquet", ROWS[:3])
    write(tmp_path / "all" / "test-00001-of-00002.parquet", ROWS[3:])
    write(tmp_path / "all" / "dev-00000-of-00001.parquet", ROWS)
    write(tmp_path / "all" / "validation-00000-of-00001.parquet", ROWS)
    benchmark = mmlu_data.load(str(tmp_path), few_shots=1)
    assert {subject: len(qs) for subject, qs in benchmark.test.items()} == {"art": 3, "law": 3}
    (tmp_path / "all" / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match="it has 1 of the 2 files of its split test"):
        mmlu_data.load(str(tmp_path), few_shots=1)


def test_an_empty_cell_is_no_choice(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("question,subject,A,B,C,D,answer\nWho?,law,I,you,,,B\n")
    assert mmlu_data.load(str(path)).test["law"][0].choices == ("I", "you")


def test_the_log_says_which_splits_are_not_used(tmp_path, caplog):
    rows = [
        {**row, "split": split}
        for row, split in zip(ROWS[:3], ("test", "Test", "dev"), strict=True)
    ]
    logging.getLogger("post_training").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "post_training"):
            mmlu_data.load(str(write(tmp_path / "all.jsonl", rows)))
    finally:
        logging.getLogger("post_training").removeHandler(caplog.handler)
    assert "splits that are not used: Test (1 rows)" in caplog.text


@pytest.mark.parametrize("with_header", [False, True])
def test_the_authors_csv_files_are_read(tmp_path, with_header):
    header = "question,choice0,choice1,choice2,choice3,answer\n" if with_header else ""
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        path = tmp_path / split / f"us_foreign_policy_{split}.csv"
        path.write_text(header + '"Who, when?\nAnd why?",w,x,y,z,C\n')
    benchmark = mmlu_data.load(str(tmp_path), few_shots=1)
    (found,) = benchmark.test["us_foreign_policy"]
    assert found == Question("us_foreign_policy", "Who, when?\nAnd why?", ("w", "x", "y", "z"), 2)


def test_a_single_file_takes_its_examples_from_the_split_column_or_its_neighbour(tmp_path):
    marked = [{**row, "split": "dev"} for row in ROWS] + [{**r, "split": "test"} for r in ROWS[:3]]
    one = mmlu_data.load(str(write(tmp_path / "all.jsonl", marked)), few_shots=2)
    assert (list(one.test), list(one.dev)) == (["law"], ["art", "law"])
    write(tmp_path / "dev.jsonl", ROWS)
    two = mmlu_data.load(str(write(tmp_path / "test.jsonl", ROWS[:3])), few_shots=2)
    assert (list(two.test), list(two.dev)) == (["law"], ["art", "law"])


@pytest.mark.parametrize("answer", [2, "2", "C", "c"])
def test_answers_are_indices_or_letters(tmp_path, answer):
    path = write(tmp_path / "x.jsonl", [{**ROWS[0], "answer": answer}])
    assert mmlu_data.load(str(path)).test["law"][0].answer == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"answer": 4}, "the answer 4 is none of its 4 choices"),
        ({"answer": "E"}, "give 0 to 3 or A to D"),
        ({"answer": ""}, "none of its 4 choices"),
        ({"choices": ["only"]}, "it has 1 choices"),
        ({"choices": None}, "it lacks choices"),
        ({"choices": ["a", None, "c", "d"]}, "choice 1 is null"),
        ({"choices": None, "choice0": "a", "choice1": None, "choice2": "c"}, "choice 1 is null"),
        ({"subject": None}, "it lacks subject"),
    ],
)
def test_a_malformed_question_is_a_usage_error_with_its_line(tmp_path, change, expected):
    path = write(tmp_path / "x.jsonl", [ROWS[0], {**ROWS[1], **change}])
    with pytest.raises(UsageError, match=expected) as caught:
        mmlu_data.load(str(path))
    assert "--mmlu-dataset" in str(caught.value)
    assert "line 2" in str(caught.value)


def test_too_few_examples_are_a_usage_error_that_names_the_subject(tmp_path):
    write(tmp_path / "test.jsonl", ROWS)
    write(tmp_path / "dev.jsonl", ROWS[:5])
    with pytest.raises(UsageError, match=r"2 examples .* of the subject art"):
        mmlu_data.load(str(tmp_path), few_shots=3)


def test_a_folder_without_a_test_split_is_a_usage_error(tmp_path):
    write(tmp_path / "dev.jsonl", ROWS)
    with pytest.raises(UsageError, match="no test split"):
        mmlu_data.load(str(tmp_path))


@pytest.mark.skipif(not SHARED.exists(), reason="the MMLU files are not part of the repository")
def test_the_whole_benchmark_has_its_known_size():
    benchmark = mmlu_data.load(str(SHARED), few_shots=5)
    assert len(benchmark.test) == 57
    assert sum(map(len, benchmark.test.values())) == 14042
    assert len(select(benchmark.test, 0.05)) == 728
    assert all(len(questions) == 5 for questions in benchmark.dev.values())
