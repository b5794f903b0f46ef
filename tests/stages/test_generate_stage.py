"""The generate stage: regenerated conversations, resumption, sampling, layouts and its errors.

The model is random and its tokenizer has one token a byte, so that texts are long and never the
same twice. What is expected comes from transformers, one prompt after the other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import served
import tools
import torch
from questions import write_questions

import generate
import mmlu
from post_training.common import redaction, resumable_jsonl
from post_training.common.errors import UsageError
from post_training.common.manifest import Manifest
from post_training.data import prompts

ANSWER = 10
CONTEXT = 256
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "AN ANSWER TO BE DROPPED"},
    {"role": "user", "content": "And who am I?"},
    {"role": "assistant", "content": "ANOTHER ONE"},
]
ROWS = [
    {"id": "talk", "messages": CONVERSATION},
    {"question_id": 81, "category": "writing", "turns": ["Compose a text.", "Shorten it."]},
    {"prompt": "What is it?"},
    {"question": "How far?", "answer": "TO BE DROPPED"},
    {"messages": [{"role": "user", "content": "x " * 100}, {"role": "user", "content": "y"}]},
    {"messages": [{"role": "user", "content": "z " * 300}]},
    {"messages": [CONVERSATION[1], {"role": "tool", "content": "42"}, CONVERSATION[4]]},
    {"messages": [CONVERSATION[2]]},
    *({"prompt": f"Question {number}: " + "why? " * (number % 5)} for number in range(14)),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    work = tmp_path_factory.mktemp("generate")
    model = tools.random_model(work / "model", "qwen3", max_position_embeddings=CONTEXT)
    # Servers choose among all rows, the local path among the tokenizer's.
    with torch.no_grad():
        model.lm_head.weight[len(tools.chat_tokenizer()) :] = 0
    model.save_pretrained(work / "model")
    file = work / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return SimpleNamespace(work=work, model=model, folder=work / "model", prompts=file)


def flags(setting, output: Path, *more: object) -> tuple[object, ...]:
    return (
        *("--pretrained-model-path", setting.folder, "--prompts-path", setting.prompts),
        *("--output", output, "--max-new-tokens", ANSWER, "--generate-batch-size", 2, "--fp32"),
        *more,
    )


SAMPLED = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.95)
TP2 = ("--tensor-model-parallel-size", 2)


@pytest.fixture(scope="module")
def killed(setting):
    """A run that was killed after its first blocks: what it had recorded then."""
    output = setting.work / "resumed.jsonl"
    process = subprocess.Popen(
        tools.command("generate.py", *flags(setting, output, *SAMPLED)),
        cwd=tools.ROOT,
        env=tools.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    state = {"done": 0}
    while state["done"] < 1:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)
        if resumable_jsonl.state_path(output).exists():
            state = json.loads(resumable_jsonl.state_path(output).read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    # Half a line, as a kill within a write leaves it.
    with resumable_jsonl.files.incomplete(output).open("a") as stream:
        stream.write('{"id": "half a li')
    return SimpleNamespace(
        output=output, state=json.loads(resumable_jsonl.state_path(output).read_text())
    )


@pytest.fixture(scope="module")
def outputs(setting, killed):
    """Every file, by what made it. Two copies of the model share the prompts; the run that was
    killed had one, and is continued by two."""
    work = setting.work
    tools.run_stages(
        ("generate", flags(setting, work / "greedy.jsonl")),
        ("generate", flags(setting, work / "sampled.jsonl", *SAMPLED)),
        ("generate", flags(setting, killed.output, *SAMPLED)),
        processes=2,
    )
    words = flags(setting, work / "sampled_tp2.jsonl", *SAMPLED, *TP2)
    tools.run_stages(("generate", words), processes=2)
    return work


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_of_transformers(setting, messages: list[dict]) -> str:
    """Greedy answer, one whole forward pass a token."""
    tokenizer = tools.chat_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    length = len(ids)
    for _ in range(ANSWER):
        logits = tools.transformers_logits(setting.model, torch.tensor([ids]))[0, -1]
        ids.append(int(logits[: len(tokenizer)].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


def test_each_user_turn_is_answered_with_the_own_answers_in_context(setting, outputs):
    rows = {row["metadata"]["index"]: row for row in read(outputs / "greedy.jsonl")}
    talk = rows[0]["messages"]
    assert [message["role"] for message in talk] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    asked = [CONVERSATION[0], CONVERSATION[1]]
    first = answer_of_transformers(setting, asked)
    assert talk[2]["content"] == first
    asked += [{"role": "assistant", "content": first}, CONVERSATION[3]]
    assert talk[4]["content"] == answer_of_transformers(setting, asked)
    assert "DROPPED" not in (outputs / "greedy.jsonl").read_text()


@pytest.mark.parametrize("index", [2, 3, 9, 13])
def test_a_prompt_is_one_user_turn(setting, outputs, index):
    rows = {row["metadata"]["index"]: row for row in read(outputs / "greedy.jsonl")}
    question, answer = rows[index]["messages"]
    asked = ROWS[index].get("prompt", ROWS[index].get("question"))
    assert question == {"role": "user", "content": asked.strip() if index == 2 else asked}
    assert answer["content"] == answer_of_transformers(setting, [question])


def test_rows_keep_their_order_and_identity(outputs):
    rows = read(outputs / "greedy.jsonl")
    assert [row["id"] for row in rows][:4] == ["talk", 81, 2, 3]
    assert rows[1]["metadata"]["category"] == "writing"
    assert len(rows[1]["messages"]) == 4
    indices = [row["metadata"]["index"] for row in rows]
    assert indices == sorted(indices)


def test_what_cannot_be_answered_is_left_out_and_counted(outputs):
    """A tool's reply depends on the answer it replied to; a greeting asks nothing; row 5 is longer
    than the context; of row 4 the first turn fits, and the second does not."""
    record = json.loads((outputs / "greedy.jsonl.run.json").read_text())
    assert record["metrics"]["left_out"] == {prompts.TOOL_TURNS: 1, prompts.NOTHING_ASKED: 1}
    rows = {row["metadata"]["index"]: row for row in read(outputs / "greedy.jsonl")}
    assert set(range(len(ROWS))) - rows.keys() == {5, 6, 7}
    assert rows[4]["metadata"]["finish_reasons"] == ["length", "context"]
    assert [message["role"] for message in rows[4]["messages"]] == ["user", "assistant"]
    assert record["metrics"]["rows"] == len(ROWS) - 3
    assert record["metrics"]["ended_by_context"] == 2
    assert record["metrics"]["generated_tokens"] == sum(
        row["metadata"]["generated_tokens"] for row in rows.values()
    )


def test_a_server_gives_the_same_rows(setting, outputs):
    """transformers' own, which knows no limit of the context: rows 4 and 5 are the server's."""
    output = setting.work / "served.jsonl"
    words = ("--prompts-path", setting.prompts, "--output", output, "--max-new-tokens", ANSWER)
    with served.transformers_serve(setting.folder, setting.work / "serve.log") as url:
        model = ("--server-model", setting.folder)
        record = served.run(generate.STAGE, "--server", url, *model, *words)
        with pytest.raises(UsageError, match="HTTP 400: Server is pinned to"):
            others = (*words, "--overwrite", "--server-retries", 0)
            served.run(generate.STAGE, "--server", url, "--server-model", "other", *others)
        top_k = (*model, *words, *SAMPLED, "--overwrite")
        with pytest.raises(UsageError, match=r"HTTP 422: Unexpected fields.*top_k"):
            served.run(generate.STAGE, "--server", url, *top_k)
        (setting.work / "questions").mkdir()
        questions = write_questions(setting.work / "questions")
        asked = ("--mmlu-dataset", questions, "--tokenizer-model", setting.folder)
        asked += ("--mmlu-output", setting.work / "mmlu.json")
        with pytest.raises(UsageError, match=r"no log probabilities.*prompt must be a string"):
            served.run(mmlu.STAGE, "--server", url, *model, *asked)
    local, found = read(outputs / "greedy.jsonl"), read(output)
    alike = [row for row in found if row["metadata"]["index"] not in (4, 5)]
    assert alike == [row for row in local if row["metadata"]["index"] != 4]
    assert len(alike) == len(ROWS) - 4
    assert record["server"]["url"] == url
    assert record["metrics"]["left_out"] == {prompts.TOOL_TURNS: 1, prompts.NOTHING_ASKED: 1}


def test_a_killed_run_goes_on_to_the_same_file(outputs, killed):
    assert 1 <= killed.state["done"] < 3, "the run ended before it was killed"
    assert killed.output.read_bytes() == (outputs / "sampled.jsonl").read_bytes()
    record = json.loads(resumable_jsonl.manifest_path(killed.output).read_text())
    assert record["metrics"]["resumed_after_prompts"] == 8 * killed.state["done"]
    assert not resumable_jsonl.state_path(killed.output).exists()


def test_sampled_answers_are_no_greedy_ones(outputs):
    greedy, sampled = read(outputs / "greedy.jsonl"), read(outputs / "sampled.jsonl")
    different = sum(a["messages"] != b["messages"] for a, b in zip(greedy, sampled, strict=True))
    assert different > 15


def test_tensor_parallel_ranks_draw_the_same(outputs):
    """Ranks that drew for themselves would part after the first token."""
    whole, split = (outputs / f"sampled{layout}.jsonl" for layout in ("", "_tp2"))
    assert split.read_text() == whole.read_text()


def test_the_manifest_names_inputs_and_the_output(outputs, setting):
    record = json.loads((outputs / "greedy.jsonl.run.json").read_text())
    assert record["stage"] == "generate"
    assert [entry["role"] for entry in record["inputs"]] == ["model", "prompts"]
    assert record["inputs"][1]["sha256"] == resumable_jsonl.files.sha256(setting.prompts)
    assert record["outputs"] == [
        {"file": "greedy.jsonl", **resumable_jsonl.hashing.describe(outputs / "greedy.jsonl")}
    ]


def test_a_number_of_tokens_is_no_secret(monkeypatch):
    words = ["generate.py", "--max-new-tokens", "10", "--hf-token", "hidden", "--x-token=hidden"]
    monkeypatch.setattr(sys, "argv", words)
    assert redaction.command() == (
        "generate.py --max-new-tokens 10 --hf-token '***' '--x-token=***'"
    )


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--max-new-tokens", 0), "--max-new-tokens 0"),
        (("--temperature", -1), "--temperature -1.0"),
        (("--top-p", 0.5), "have no effect"),
        (("--temperature", 1, "--top-p", 0), "--top-p 0.0"),
        (("--prompts-path", "/nowhere/x.jsonl"), "--prompts-path /nowhere/x.jsonl"),
        (("--chat-template-options", "{enable}"), "it is no JSON object"),
        (("--output", tools.ROOT / "Makefile" / "x.jsonl"), "Makefile is a file"),
        (("--context-parallel-size", 2), "CP=2"),
    ],
)
def test_usage_errors_come_before_anything_is_loaded(setting, more, expected):
    words = map(str, flags(setting, setting.work / "new.jsonl", *more, "--check"))
    program = (
        "import sys, generate\n"
        "try: generate.main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "else: sys.exit('it was accepted')\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tools.ROOT,
        env=tools.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stderr
    assert "cause:" in done.stderr
    assert "remedy:" in done.stderr


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ["b", 3]}\n')
    with pytest.raises(UsageError, match=r"line 2"):
        prompts.load(str(path), "--prompts-path")


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("One?\n\n Two?\n")
    found = prompts.load(str(path), "--prompts-path").dialogues
    assert [each.messages[0]["content"] for each in found] == ["One?", "Two?"]


def test_other_settings_do_not_go_on_with_the_rows_of_a_killed_run(tmp_path):
    target = tmp_path / "out.jsonl"
    rows = resumable_jsonl.Rows(target, {"temperature": 0.0})
    rows.append([{"id": 1}], done=1, totals={})
    with pytest.raises(UsageError, match=r"temperature was 0\.0 and is 1\.0"):
        resumable_jsonl.check(target, {"temperature": 1.0}, overwrite=False)
    resumable_jsonl.check(target, {"temperature": 1.0}, overwrite=True)
    assert resumable_jsonl.Rows(target, {"temperature": 0.0}).done == 1
    assert resumable_jsonl.Rows(target, {"temperature": 1.0}).done == 0


def test_rows_that_are_replaced_never_lie_beside_the_manifest_of_others(tmp_path):
    target = tmp_path / "out.jsonl"

    def make(text):
        rows = resumable_jsonl.Rows(target, {})
        rows.append([{"text": text}], done=1, totals={})
        return rows

    make("old").finish(Manifest("generate", {}))
    manifest_path = resumable_jsonl.manifest_path(target)
    rows = make("new")
    manifest_path.unlink()
    manifest_path.mkdir()  # the run ends where it writes the manifest
    with pytest.raises(OSError):
        rows.finish(Manifest("generate", {}))
    assert not target.exists()
    manifest_path.rmdir()
    again = resumable_jsonl.Rows(target, {})
    assert again.done == 1
    again.finish(Manifest("generate", {}))
    assert json.loads(target.read_text()) == {"text": "new"}


def test_a_finished_file_is_not_overwritten_unasked(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("{}\n")
    with pytest.raises(UsageError, match="it exists"):
        resumable_jsonl.check(target, {}, overwrite=False)
    with pytest.raises(UsageError, match="no stage made it"):
        resumable_jsonl.check(target, {}, overwrite=True)
    resumable_jsonl.manifest_path(target).write_text("{}")
    resumable_jsonl.check(target, {}, overwrite=True)
