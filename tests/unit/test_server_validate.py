"""validate.py with --server: what it makes of an engine's counters, in the engines' own forms.

The servers here stream fixed answers and count as vLLM 0.24 and SGLang 0.5.23 do.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import served
from served import Reply

import validate
from post_training.common.errors import UsageError

STEPS = 3
# Draft tokens that the verifications of each prompt's answer accept, by the prompt's number.
ACCEPTED = {0: [3, 3, 0], 1: [1, 2], 2: [0, 0, 0, 3], 3: [2]}
CATEGORIES = {0: "writing", 1: "math", 2: "writing", 3: "math"}


def text_of(number):
    return f"answer {number}"


def stream(text, tokens, *, chat, **last):
    """Server-sent events: two halves of a text, then what it counts."""
    halves = (text[: len(text) // 2], text[len(text) // 2 :])
    kind = "chat.completion.chunk" if chat else "text_completion"
    events = []
    for each in halves:
        said = {"delta": {"content": each}} if chat else {"text": each}
        events.append({"choices": [{"index": 0, **said}]})
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}
    events.append({"choices": [], "usage": usage, **last})
    common = {"id": "x", "object": kind, "created": 0, "model": "tiny"}
    lines = [f"data: {json.dumps({**common, **event})}\n\n" for event in events]
    return Reply("".join([*lines, "data: [DONE]\n\n"]))


class Engine:
    """Counts, and answers with what a prompt's number says; its metrics are vLLM's page."""

    def __init__(self, *, drafted=True, others=0, suffix=""):
        self.drafts = self.generated = 0
        self.positions = [0] * STEPS
        self.drafted, self.others, self.suffix = drafted, others, suffix

    def post(self, number, path, body):
        chat = "messages" in body
        asked = int(body["messages"][-1]["content"]) if chat else body["prompt"][-1]
        accepted = ACCEPTED[asked]
        tokens = 1 + sum(accepted) + len(accepted)
        self.drafts += len(accepted)
        self.generated += tokens + self.others
        for place in range(STEPS):
            self.positions[place] += sum(each > place for each in accepted)
        histogram = [accepted.count(each) for each in range(max(accepted) + 1)]
        details = {"spec_verify_ct": len(accepted), "spec_correct_drafts_histogram": histogram}
        told = {"sglext": {"spec_tokens_details": details}}
        wanted = body.get("return_spec_tokens_details") and self.drafted
        text = text_of(asked) + self.suffix
        return stream(text, tokens, chat=chat, **(told if wanted else {}))

    def metrics(self):
        labels = 'engine="0",model_name="tiny"'
        page = "# HELP vllm:generation_tokens_total Number of generation tokens.\n"
        page += f"vllm:generation_tokens_total{{{labels}}} {float(self.generated)}\n"
        if self.drafted:
            page += f"vllm:spec_decode_num_drafts_total{{{labels}}} {float(self.drafts)}\n"
            page += f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.7e+09\n"
            for place, count in enumerate(self.positions):
                page += (
                    "vllm:spec_decode_num_accepted_tokens_per_pos_total"
                    f'{{{labels},position="{place}"}} {float(count)}\n'
                )
        return page

    def pages(self, **more):
        return {"/metrics": self.metrics, "/version": {"version": "0.24.0"}, **more}


@pytest.fixture
def files(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": str(number), "category": CATEGORIES[number]} for number in ACCEPTED]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = tmp_path / "truth.json"
    answers = [
        {"id": number, "prompt": [7, number], "tokens": [1], "text": f"{text_of(number)}<|end|>"}
        for number in ACCEPTED
    ]
    answers[3]["text"] = "something else"
    settings = {"prompts": "saved", "steps": 1, "osl": 64, "ignore_eos": False, "temperature": 0.0}
    saved = {"settings": settings, "acceptance": {"acceptance_length": 2.1}, "answers": answers}
    truth.write_text(json.dumps(saved))
    return SimpleNamespace(prompts=prompts, truth=truth, report=tmp_path / "report.json")


def run(files, engine, *flags, pages=None, **more):
    asked = ("--validate-output", files.report)
    if "--ground-truth-path" not in flags:
        asked += ("--prompts-path", files.prompts)
    with served.scripted(engine.post, pages or engine.pages()) as server:
        return served.run(validate.STAGE, "--server", server.url, *asked, *flags, **more)


def test_vllms_counters_give_the_acceptance_of_each_answer(files):
    found = run(files, Engine())["acceptance"]
    flat = [each for answer in ACCEPTED.values() for each in answer]
    assert found["acceptance_length"] == round(1 + sum(flat) / len(flat), 5)
    assert found["verifications"] == len(flat)
    assert found["histogram"] == [flat.count(each) for each in range(STEPS + 1)]
    assert found["acceptance_rate_by_position"] == [
        round(sum(each > place for each in flat) / len(flat), 5) for place in range(STEPS)
    ]
    assert found["interval_95"][0] < found["acceptance_length"] < found["interval_95"][1]
    math = [*ACCEPTED[1], *ACCEPTED[3]]
    assert found["categories"]["math"]["acceptance_length"] == round(1 + sum(math) / 3, 5)
    assert found["tokens"] == sum(1 + sum(each) + len(each) for each in ACCEPTED.values())
    assert found["speculative_seconds_to_first_token"]["median"] > 0
    report = json.loads(files.report.read_text())
    assert [sorted(each["accepted"]) for each in report["accepted"]] == [
        sorted(each) for each in ACCEPTED.values()
    ]
    assert report["settings"]["steps"] == STEPS
    assert report["server"]["engine"] == "vllm"
    assert report["server"]["version"] == "0.24.0"


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_many_requests_at_a_time_count_the_same(files, owner):
    """vLLM's counters are read for a category at a time; SGLang tells with each answer."""
    info = {"version": "0.5.23", "speculative_num_steps": STEPS}
    models = served.models("tiny", owner=owner)
    pages = Engine().pages() if owner == "vllm" else {"/server_info": info}
    alone = run(files, Engine())["acceptance"]
    engine = Engine()
    if owner == "vllm":
        pages = engine.pages()
    found = run(files, engine, "--server-concurrency", 4, pages={**pages, "/v1/models": models})
    together = found["acceptance"]
    for name in ("acceptance_length", "histogram", "acceptance_rate_by_position", "answers"):
        assert together[name] == alone[name]
    by_category = {name: each["histogram"] for name, each in together["categories"].items()}
    assert by_category == {n: each["histogram"] for n, each in alone["categories"].items()}
    assert bool(found["accepted"]) == (owner == "sglang")


def test_a_baseline_gives_speed_up_and_answers(files):
    plain = Engine(drafted=False, suffix="!")
    plain_pages = {"/v1/models": served.models("tiny")}
    with served.scripted(plain.post, plain_pages) as server:
        flags = ("--server-baseline", server.url)
        found = run(files, Engine(), *flags)
        acceptance = found["acceptance"]
        assert acceptance["identical_answers"] == 0
        assert len(acceptance["differences"]) == len(ACCEPTED)
        assert acceptance["speed_up"] > 0
        assert acceptance["plain_tokens_per_second"] > 0
        assert found["baseline"]["url"] == f"{server.url}/v1"
        run(files, Engine(), *flags, "--require-identical", code=1)
        run(files, Engine(suffix="!"), *flags, "--require-identical")


def test_the_megatron_sides_answers_and_acceptance_are_compared(files, capsys):
    found = run(files, Engine(), "--ground-truth-path", files.truth, "--lower-bound", 1.2)
    truth = found["ground_truth"]
    assert (truth["same_answers"], truth["compared_answers"]) == (3, 4)
    assert truth["saved_acceptance_length"] == 2.1
    assert truth["differing_settings"][0].startswith("prompts_sha256 differs")
    assert "steps differs from the saved ground truth's: 1 there, 3 here" in str(truth)
    run(files, Engine(), "--ground-truth-path", files.truth, "--require-identical", code=1)
    assert "1 answers differ from the saved ones" in capsys.readouterr().err
    run(files, Engine(), "--lower-bound", 3.9, code=1)


def test_answers_of_others_are_noticed(files, caplog):
    run(files, Engine(others=5))
    assert "it serves others too" in caplog.text


@pytest.mark.parametrize(
    ("flags", "drafted", "models", "expected"),
    [
        ((), False, {}, r"num_drafts_total.*\n.*--speculative-config"),
        ((), False, {"owner": "someone"}, "it counts no accepted draft tokens"),
        ((), False, {"owner": "sglang"}, r"say nothing of a draft.*\n.*EAGLE3"),
        (("--lower-bound", 0.5), True, {}, "no acceptance at all"),
        (("--require-identical",), True, {}, "no answers to compare with"),
        (("--save-ground-truth-path", "/tmp/x.json"), True, {}, "it keeps tokens"),
        (("--server-baseline", "gpu7"), True, {}, "--server-baseline"),
    ],
)
def test_refusals(files, flags, drafted, models, expected):
    engine = Engine(drafted=drafted)
    page = served.models("tiny", **models)
    pages = {"/v1/models": page}
    if models.get("owner") in (None,):
        pages |= engine.pages()
    elif models["owner"] == "someone":
        pages["/metrics"] = "process_cpu_seconds_total 3.0\n"
    with pytest.raises(UsageError, match=expected):
        run(files, engine, *flags, pages=pages)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply('data: {"choices": [], "model": "tiny"}\n\ndata: [DONE]\n\n'), "without usage"),
        (Reply('data: {"error": {"message": "lost a GPU"}}\n\n'), "lost a GPU"),
        (Reply("data: {broken\n\n"), "Expecting property name"),
        (Reply({"error": {"message": "busy"}}, 503, {"Retry-After": "0.01"}), "HTTP 503: busy"),
    ],
)
def test_broken_streams_are_explained(files, reply, expected):
    engine = Engine()
    with (
        served.scripted(lambda *_: reply, engine.pages()) as server,
        pytest.raises(UsageError, match=expected),
    ):
        flags = ("--prompts-path", files.prompts, "--validate-output", files.report)
        served.run(validate.STAGE, "--server", server.url, "--server-retries", 1, *flags)
