"""The loss mask of answer-only training: exactly the answers' tokens, whatever the template."""

from __future__ import annotations

import pytest
import tools

from post_training.common.errors import UsageError
from post_training.data import assistant_mask
from post_training.data.assistant_mask import Tokens
from post_training.data.document_formats import Document, document_of
from post_training.data.packing import Packer
from post_training.data.records import Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Says itself what the model writes.
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
)
# As reasoning models: thoughts of earlier turns are dropped, the last turn gets an empty thought.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim if not loop.last else m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endif %}{% endfor %}"
)
REPEATED = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end] {% endfor %}"

CONVERSATION = (
    ("system", "Be brief."),
    ("user", "What is 2 + 2?"),
    ("assistant", "It is 4."),
    ("user", "And <|im_end|> 3?"),
    ("assistant", "It is 4."),
)


def tokenizer(template: str):
    made = tools.chat_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def document(*turns: tuple[str, str]) -> Document:
    return Document("here, line 7", messages=tuple({"role": r, "content": c} for r, c in turns))


def masked(found: Tokens, made) -> list[str]:
    """The texts of the runs of masked tokens."""
    parts, before = [], False
    for token, inside in zip(found.ids, found.mask, strict=True):
        if inside and not before:
            parts.append([])
        if inside:
            parts[-1].append(token)
        before = inside
    return [made.decode(part) for part in parts]


def test_the_mask_of_a_conversation_written_out_by_hand():
    made = tokenizer("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    found = assistant_mask.tokenize(document(("user", "hi"), ("assistant", "yo!")), made, "--data")
    # One token a byte:      u  :  h  i  \n a  :  y  o  !  \n
    expected = [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert made.decode(found.ids) == "u:hi\na:yo!\n"
    assert [int(each) for each in found.mask] == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["It is 4.<|im_end|>", "It is 4.<|im_end|>"]),
        (TAGGED, ["It is 4.<|im_end|>", "It is 4.<|im_end|>"]),
        (THINKING, ["It is 4.<|im_end|>", "It is 4.<|im_end|>"]),
        (REPEATED, ["It is 4.", "It is 4."]),
    ],
)
def test_answers_and_their_end_tokens_are_masked(template, expected):
    made = tokenizer(template)
    found = assistant_mask.tokenize(document(*CONVERSATION), made, "--data")
    assert masked(found, made) == expected


def test_the_tokens_are_those_of_the_whole_conversation():
    made = tokenizer(CHATML)
    found = assistant_mask.tokenize(document(*CONVERSATION), made, "--data")
    messages = [{"role": role, "content": content} for role, content in CONVERSATION]
    text = made.apply_chat_template(messages, tokenize=False)
    assert found.ids == made(text, add_special_tokens=False)["input_ids"]


def test_what_a_template_changes_in_an_answer_is_found():
    made = tokenizer(THINKING)
    turns = (("user", "a"), ("assistant", "<think>x</think>  one "), ("user", "b"),
             ("assistant", "<think>y</think>two"))  # fmt: skip
    found = assistant_mask.tokenize(document(*turns), made, "--data")
    assert masked(found, made) == ["one<|im_end|>", "<think>y</think>two<|im_end|>"]


def test_an_answer_that_quotes_the_template_is_found():
    made = tokenizer(REPEATED)
    turns = (("user", "a"), ("assistant", "x [end] [user] y"), ("user", "[end]"),
             ("assistant", "z"))  # fmt: skip
    found = assistant_mask.tokenize(document(*turns), made, "--data")
    assert masked(found, made) == ["x [end] [user] y", "z"]


def test_tokenizers_without_offsets_give_the_same_mask():
    made = tokenizer(CHATML)
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    start = text.index("yo")
    spans = [(start, start + len("yo<|im_end|>"))]
    assert assistant_mask._by_pieces(text, spans, made, False) == assistant_mask._tokens(
        text, spans, made, False
    )


def test_the_mask_is_shown_in_brackets():
    made = tokenizer(REPEATED)
    found = assistant_mask.tokenize(document(("user", "a"), ("assistant", "b")), made, "--data")
    assert assistant_mask.show(found, made, color=False) == "[user] a [end] [assistant] ⟦b⟧ [end] "
    assert "\x1b[32mb\x1b[0m" in assistant_mask.show(found, made, color=True)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "mask is empty"),
        ({"messages": [{"role": "assistant", "content": "  "}]}, "mask is empty"),
        (
            {"question": "zqBeginXqz", "answer": "b"},
            "it contains zqBeginXqz, by which answers are found",
        ),
        ({"text": "a"}, "plain text"),
        ({"messages": [{"role": "assistent", "content": "a"}]}, "assistent"),
        ({"conversations": [{"from": "gpt", "value": ["a"]}]}, "not text"),
    ],
)
def test_a_conversation_without_an_answer_is_an_error_at_its_line(values, cause):
    with pytest.raises(UsageError, match="line 7") as caught:
        assistant_mask.tokenize(
            document_of(Row("f.jsonl, line 7", values), "--data"), tokenizer(CHATML), "--data"
        )
    assert cause in str(caught.value)


def test_sharegpt_and_openai_forms_give_the_same_tokens():
    made = tokenizer(CHATML)
    forms = (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b"}]},
        {"question": "a", "response": "b"},
    )
    found = [
        assistant_mask.tokenize(document_of(Row("f, line 1", form), "--data"), made, "--data")
        for form in forms
    ]
    assert found.count(found[0]) == len(forms)


def test_packing_keeps_conversations_whole_and_counts_what_it_leaves_out():
    packer = Packer(10)
    sizes = (6, 5, 4, 3, 12)
    for number, size in enumerate(sizes):
        packer.add(Tokens([number] * size, [False, False] + [True] * (size - 2)))
    packer.add(Tokens([9] * 20, [False] * 15 + [True] * 5))  # its answer lies beyond a sequence
    packer.finish()
    ids, mask = packer.arrays()
    rows = sorted(tuple(row) for row in ids.tolist())
    assert rows == [(0,) * 6 + (2,) * 4, (1,) * 5 + (3,) * 3 + (0, 0), (4,) * 10]
    assert mask.sum() == (6 - 2) + (5 - 2) + (4 - 2) + (3 - 2) + (10 - 2)
    assert (packer.cut, packer.dropped) == (2, 1)
