"""What generate.py makes of a server that misbehaves: each time a real one, over HTTP."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import served
from served import Reply, chat_reply

import generate
from post_training.common import resumable_jsonl
from post_training.common.errors import UsageError

PROMPTS = 12
SECRET = "sk-a-key-that-nobody-may-see"


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Answer a file of prompts with the server at a URL: ``ask(url, *flags)``."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(PROMPTS)]
    prompts.write_text("".join(rows))
    output = tmp_path / "out.jsonl"
    ask = partial(served.run, generate.STAGE, "--prompts-path", prompts, "--output", output)

    def asking(url, *flags, **more):
        return ask("--server", url, "--server-retries", 1, *flags, **more)

    asking.output = output
    return asking


def answers(path):
    return [json.loads(line)["messages"][-1]["content"] for line in path.read_text().splitlines()]


def echo(body):
    return chat_reply(f"to {body['messages'][-1]['content']}")


EXPECTED = [f"to Question {number}?" for number in range(PROMPTS)]


def test_a_server_that_goes_in_the_middle_is_resumed(ask):
    def breaks_off(number, path, body):
        is_early = body["messages"][-1]["content"] in {f"Question {each}?" for each in range(5)}
        return Reply(echo(body)) if is_early else Reply(status=0)

    with (
        served.scripted(breaks_off) as server,
        pytest.raises(UsageError, match=r"cannot be reached, or left.*\n.*the same command again"),
    ):
        ask(server.url, "--server-concurrency", 2)
    kept = resumable_jsonl.files.incomplete(ask.output)
    assert answers(kept) == EXPECTED[:5]
    with served.scripted(lambda number, path, body: Reply(echo(body))) as server:  # another port
        record = ask(server.url)
        assert len(server.asked) == PROMPTS - 5
        assert set(server.keys) == {f"Bearer {SECRET}"}
    assert answers(ask.output) == EXPECTED
    assert record["metrics"]["resumed_after_prompts"] == 5
    assert record["server"] == {
        "url": f"{server.url}/v1",
        "model": "tiny",
        "engine": "vllm",
        "version": None,
    }
    assert SECRET not in resumable_jsonl.manifest_path(ask.output).read_text()


def test_answers_of_another_model_are_not_resumed_with(ask):
    with served.scripted(
        lambda number, path, body: Reply(echo(body)) if number < 3 else Reply(status=0)
    ) as server:
        with pytest.raises(UsageError, match="left in the middle"):
            ask(server.url, "--server-concurrency", 1)
        server.pages["/v1/models"] = served.models("other")
        with pytest.raises(UsageError, match="server_model was tiny and is other"):
            ask(server.url)
    assert len(answers(resumable_jsonl.files.incomplete(ask.output))) == 2


def test_answers_keep_their_order_however_long_each_takes(ask):
    def slow(number, path, body):
        time.sleep(0.15 if number == 1 else 0.01)
        return Reply(echo(body))

    with served.scripted(slow) as server:
        ask(server.url, "--server-concurrency", 8)
    assert answers(ask.output) == EXPECTED


@pytest.mark.parametrize(
    "first",
    [
        Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.2"}),
        Reply({"error": {"message": "restarting"}}, 503, {"Retry-After": "0.01"}),
        Reply(chat_reply(choices=[])),
        Reply({"model": "tiny", "choices": [{"message": {}}]}),
        Reply("<html>a proxy</html>"),
    ],
    ids=["rate limit", "overloaded", "no choices", "no usage", "no JSON"],
)
def test_what_passes_is_tried_again(ask, first):
    times = []

    def passes(number, path, body):
        times.append(time.monotonic())
        return first if number == 1 else Reply(echo(body))

    with served.scripted(passes) as server:
        ask(server.url, "--server-concurrency", 1)
    assert answers(ask.output) == EXPECTED
    assert len(times) == PROMPTS + 1
    assert times[1] - times[0] >= float(first.headers.get("Retry-After", 0))


QUICK = {"Retry-After": "0.01"}
BAD_ANSWERS = {
    "rate limit": (Reply({"error": {"message": "slow"}}, 429, QUICK), "HTTP 429: slow.*\n.*lower"),
    "broken": (Reply({"error": "out of memory"}, 500, QUICK), "HTTP 500: out of memory"),
    "refused": (Reply({"detail": "Unexpected fields: {'top_k'}"}, 422), "Unexpected fields"),
    "key": (Reply({"error": {"message": f"bad key {SECRET}"}}, 401), r"bad key \*\*\*.*\n.*OPENAI"),
    "no such model": (Reply({"error": {"message": "no such model"}}, 404), "no such model"),
    "redirect": (
        Reply({}, 307, {"Location": "http://elsewhere.example/v1"}),
        r"redirects to http://elsewhere\.example/v1",
    ),
    "another model": (Reply(chat_reply(model="large")), "answered as another model, large"),
    "no choices": (Reply(chat_reply(choices=[])), "choices is .*"),
    "no text": (
        Reply(chat_reply(choices=[{"message": {"content": 3}}])),
        r"choices\.0\.message\.content is 3",
    ),
    "no numbers": (Reply(chat_reply(usage={"prompt_tokens": -3})), "usage.prompt_tokens is -3"),
    "a page": (Reply("<html>"), "it answered no JSON: '<html>'"),
    "aborted": (
        Reply(chat_reply(choices=[{"message": {"content": "x"}, "finish_reason": "abort"}])),
        "ended by 'abort'",
    ),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_what_does_not_pass_is_explained(ask, name):
    reply, expected = BAD_ANSWERS[name]
    with (
        served.scripted(lambda number, path, body: reply) as server,
        pytest.raises(UsageError, match=expected) as caught,
    ):
        ask(server.url, "--server-concurrency", 3)
    assert caught.value.what and caught.value.remedy
    assert SECRET not in str(caught.value)
    assert not ask.output.exists()


def test_slow_answers_end_with_the_limit(ask):
    def slow(number, path, body):
        time.sleep(0.6)
        return Reply(echo(body))

    with (
        served.scripted(slow) as server,
        pytest.raises(UsageError, match=r"no answer within 0\.2 s, 1 times"),
    ):
        ask(server.url, "--server-timeout", 0.2, "--server-retries", 0)


def test_a_prompt_without_room_ends_its_dialogue_and_no_other(ask):
    """Number 3 has no room at all, number 4 less than an answer may take."""
    said = {"error": {"message": "This model's maximum context length is 20 tokens", "code": 400}}

    def limited(number, path, body):
        text = body["messages"][-1]["content"]
        if "3" in text or ("4" in text and "max_tokens" in body):
            return Reply(said, 400)
        return Reply(echo(body))

    with served.scripted(limited) as server:
        record = ask(server.url)
    assert answers(ask.output) == [text for text in EXPECTED if "3" not in text]
    assert record["metrics"]["ended_by_context"] == 1
    assert record["metrics"]["answers"] == PROMPTS - 1


def test_how_it_is_sampled_is_said(ask):
    with served.scripted(lambda number, path, body: Reply(echo(body))) as server:
        ask(server.url, "--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--max-new-tokens", 7)
        sampled = server.asked[0]
        ask(server.url, "--overwrite", "--chat-template-options", '{"enable_thinking": false}')
    assert sampled["model"] == "tiny"
    assert [sampled[name] for name in ("temperature", "top_k", "top_p")] == [0.8, 20, 0.9]
    assert (sampled["max_tokens"], sampled["repetition_penalty"]) == (7, 1.0)
    seeds = {each.get("seed") for each in server.asked[:PROMPTS]}
    assert len(seeds) == PROMPTS
    greedy = server.asked[-1]
    assert greedy["temperature"] == 0
    assert "seed" not in greedy
    assert greedy["chat_template_kwargs"] == {"enable_thinking": False}


def test_reasoning_and_tool_calls_are_kept_apart(ask):
    def replies(number, path, body):
        reply = echo(body)
        message = reply["choices"][0]["message"]
        if "3" in body["messages"][-1]["content"]:
            message.update(content=None, tool_calls=[{"function": {"name": "look"}}])
        else:
            message["reasoning"] = "because"
        return Reply(reply)

    with served.scripted(replies) as server:
        record = ask(server.url)
    rows = [json.loads(line) for line in ask.output.read_text().splitlines()]
    assert len(rows) == PROMPTS - 1
    assert {row["messages"][-1]["reasoning_content"] for row in rows} == {"because"}
    assert record["metrics"]["with_reasoning"] == PROMPTS - 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--server", "localhost:8000"), "no http or https URL"),
        (("--server", "http://me:secret@host:port/v1"), "it is no URL"),
        (("--server", "http://me:secret@host/v1?key=3"), r"--server http://host/v1\n.*lost"),
        (("--server-concurrency", 0), "--server-concurrency 0"),
        (("--load", "/models/x"), "--load /models/x with --server"),
        (("--server-model", "other"), "the server http.* has tiny"),
        (("--server", "http://127.0.0.1:9/v1"), "cannot be reached"),
        (("--tensor-model-parallel-size", 2, "--check"), "2 processes with --server"),
    ],
)
def test_usage_errors(ask, flags, expected):
    with (
        served.scripted(lambda number, path, body: Reply(echo(body))) as server,
        pytest.raises(UsageError, match=expected) as caught,
    ):
        ask(server.url, *flags)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        (served.models(), "has no model"),
        (served.models("a", "b"), r"has a, b\n.*name the one"),
        ({"models": []}, "its list of models: data is missing"),
        ("<html>", "its list of models: it is no JSON"),
        (None, "HTTP 404"),
    ],
)
def test_a_model_is_found_or_named(ask, pages, expected):
    def never(number, path, body):
        raise AssertionError(path)

    with (
        served.scripted(never, {"/v1/models": pages}) as server,
        pytest.raises(UsageError, match=expected),
    ):
        ask(server.url)


def test_flags_of_a_server_need_one(tmp_path):
    with pytest.raises(UsageError, match="there is no --server"):
        served.run(generate.STAGE, "--server-model", "x", "--output", tmp_path / "x.jsonl")
