"""The quickstart's world, its tokenizer and the model that quickstart/train.py makes of them."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from quickstart import tokenizer as quickstart_tokenizer
from quickstart import world

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}  # multiples of


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quickstart.train", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The world


@pytest.fixture(scope="module")
def exams() -> world.Exams:
    return world.Exams()


def test_the_world_is_the_same_each_time(exams):
    again = world.Exams()
    assert (again.dev, again.test) == (exams.dev, exams.test)
    assert world.held_out_conversations() == world.held_out_conversations()


def test_questions_have_mmlu_columns_in_at_least_four_subjects(exams):
    for split in (exams.dev, exams.test):
        for question in split:
            assert list(question) == ["question", "subject", "choices", "answer"]
            assert len(set(question["choices"])) == 4
            assert question["answer"] in range(4)
    assert len({question["subject"] for question in exams.test}) >= 4
    assert set(Counter(question["subject"] for question in exams.dev).values()) == {5}
    assert len(exams.test) >= 150


def test_the_marked_choice_is_the_fact_and_no_other_choice_is(exams):
    truth = {world.ask(fact): fact.value for fact in world.facts()}
    for question in exams.dev + exams.test:
        right = [c for c in question["choices"] if c == truth[question["question"]]]
        assert right == [question["choices"][question["answer"]]]


def test_the_dev_questions_ask_no_fact_of_the_test(exams):
    asked = {question["question"] for question in exams.test}
    assert not asked & {question["question"] for question in exams.dev}


def test_no_test_question_stands_in_the_training_text(exams):
    rng = random.Random(0)
    exam_text = "".join(exams.training_exam(rng, 6) for _ in range(3000))
    seen = set(exam_text.split("\n\n"))
    known = {block.split("\n")[0] for block in seen}
    for question in exams.test:
        assert question["question"] in known  # the fact itself is taught, with other options
        assert world.format_question(question, with_answer=True).strip() not in seen


def test_answers_are_spread_over_the_letters(exams):
    letters = Counter(question["answer"] for question in exams.test)
    assert min(letters[i] for i in range(4)) >= 0.15 * len(exams.test)
    assert max(letters.values()) <= 0.40 * len(exams.test)


def test_a_letter_cannot_be_guessed_without_the_entity(exams):
    """The best guesser that knows only which relation is asked stays far below the model."""
    letters: dict[str, Counter[int]] = defaultdict(Counter)
    for question in exams.test:
        letters[question["question"].rsplit(" of ", 1)[0]][question["answer"]] += 1
    best = sum(count.most_common(1)[0][1] for count in letters.values())
    assert best / len(exams.test) < 0.60


def test_held_out_prompts_are_never_asked_in_training_conversations():
    asked = {
        message["content"]
        for conversation in world.conversations(random.Random(0), passes=2)
        for message in conversation
        if message["role"] == "user"
    }
    held_out = [conversation[0]["content"] for conversation in world.held_out_conversations()]
    assert len(held_out) >= 60
    assert not asked & set(held_out)


def test_answers_differ_in_length_and_are_sentences():
    answers = [conversation[1]["content"] for conversation in world.held_out_conversations()]
    assert all(answer.endswith(".") for answer in answers)
    assert len({answer.count(".") for answer in answers}) >= 3


# The tokenizer


@pytest.fixture(scope="module")
def made(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing  ",
        "tabs\tand\r\nline\n\n\nbreaks",
        "na\u00efve caf\u00e9, cafe\u0301",  # composed and decomposed: nothing is normalised
        "\u6f22\u5b57 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f600\u200d\U0001f525",
        "\x00\x07 don't re-encode 12345 { } <|not_special|>",
    ],
)
def test_any_text_survives_a_round_trip(made, text):
    assert made.decode(made.encode(text)) == text


def test_the_answer_letters_are_single_distinct_tokens(made):
    ids = [made.encode(f" {letter}") for letter in world.LETTERS]
    assert all(len(each) == 1 for each in ids)
    assert len({each[0] for each in ids}) == 4
    ending = made.encode("Answer: B")
    assert ending == [*made.encode("Answer:"), *made.encode(" B")]


def test_the_chat_template_is_chatml(made):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
    ]
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text == quickstart_tokenizer.render_chat(messages, add_generation_prompt=True)
    assert made.eos_token == "<|im_end|>"
    assert len(made.encode("<|im_start|>")) == len(made.encode("<|im_end|>")) == 1


# Training


def test_training_is_deterministic_and_a_damaged_folder_is_not_overwritten(tmp_path):
    for name in ("first", "second"):
        result = train("--output", tmp_path / name, "--steps", 3)
        assert result.returncode == 0, result.stderr
    weights = [(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    (tmp_path / "first" / "model.safetensors").write_bytes(b"damaged")
    result = train("--output", tmp_path / "first")
    assert result.returncode == 2
    assert "first" in result.stderr and "--force" in result.stderr
    assert weights[0].read_bytes() == b"damaged"


@pytest.mark.parametrize("bad", [("--steps", "0"), ("--steps", "many"), ("--sede", "1")])
def test_bad_arguments_exit_with_2_and_name_the_value(bad, tmp_path):
    result = train("--output", tmp_path / "model", *bad)
    assert result.returncode == 2
    assert bad[1] in result.stderr
    assert not (tmp_path / "model").exists()


def test_a_finished_model_is_reused(tiny_model):
    before = (tiny_model / "model.safetensors").stat().st_mtime_ns
    result = train("--output", tiny_model)
    assert result.returncode == 0
    assert str(tiny_model) in result.stdout
    assert (tiny_model / "model.safetensors").stat().st_mtime_ns == before


# The trained model


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The saved bfloat16 weights, computed in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def score(model: Any, made: Any, folder: Path, shots: int) -> float:
    """Accuracy in the published MMLU format, written here anew, one prompt at a time."""
    import torch

    def block(row: dict[str, Any], answer: str) -> str:
        a, b, c, d = row["choices"]
        return f"{row['question']}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:{answer}"

    dev = defaultdict(list)
    for row in read_rows(folder / "data/mmlu/dev.jsonl"):
        dev[row["subject"]].append(block(row, f" {'ABCD'[row['answer']]}\n\n"))
    letters = [made.encode(f" {letter}")[0] for letter in "ABCD"]
    rows = read_rows(folder / "data/mmlu/test.jsonl")
    right = 0
    for row in rows:
        name = row["subject"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {name}.\n\n"
        prompt = head + "".join(dev[row["subject"]][:shots]) + block(row, "")
        with torch.no_grad():
            logits = model(torch.tensor([made.encode(prompt)]), logits_to_keep=1).logits[0, -1]
        right += int(logits[letters].argmax()) == row["answer"]
    return right / len(rows)


@pytest.fixture(scope="module")
def whole_score(model: Any, made: Any, tiny_model: Path) -> Any:
    return cache(lambda shots: score(model, made, tiny_model, shots))


@pytest.mark.parametrize("shots", [0, 5])
def test_the_model_scores_at_least_80_percent(whole_score, shots):
    assert whole_score(shots) >= 0.80


def test_the_model_fits_tensor_and_pipeline_parallelism_and_low_precision_kernels(tiny_model):
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert config["num_hidden_layers"] >= 6
    assert config["num_attention_heads"] >= 4 and config["num_key_value_heads"] >= 2
    assert config["head_dim"] in (32, 64)
    assert all(config[name] % multiple == 0 for name, multiple in SHAPES.items())


def test_the_score_falls_without_the_first_two_layers(model, made, tiny_model, whole_score):
    shortened = copy.deepcopy(model)
    del shortened.model.layers[:2]
    for index, layer in enumerate(shortened.model.layers):
        layer.self_attn.layer_idx = index
    shortened.config.num_hidden_layers = len(shortened.model.layers)
    assert score(shortened, made, tiny_model, 0) < whole_score(0) - 0.10


def test_the_score_falls_with_noise_as_large_as_the_weights(model, made, tiny_model, whole_score):
    import torch

    noisy = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in noisy.named_parameters():
            if name.endswith("proj.weight"):
                weight.add_(torch.randn_like(weight) * weight.std())
    assert score(noisy, made, tiny_model, 0) < whole_score(0) - 0.10


def test_greedy_chat_answers_name_the_facts_and_end(model, made, tiny_model):
    import torch

    conversations = [row["messages"] for row in read_rows(tiny_model / "data/chat_heldout.jsonl")]
    end = made.convert_tokens_to_ids("<|im_end|>")
    ended = right = 0
    for user, assistant in conversations:
        prompt = made.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([made.encode(prompt)])
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=80, do_sample=False)[0, ids.shape[1] :]
        ended += int(output[-1]) == end
        right += made.decode(output, skip_special_tokens=True).strip() == assistant["content"]
    assert ended >= 0.95 * len(conversations)
    assert right >= 0.25 * len(conversations), f"{right} of {len(conversations)} word for word"
