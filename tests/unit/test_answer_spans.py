"""The loss mask over the forms of chat templates that models use: what the model would generate.

Each form is written twice: as a template, and as the pieces that it consists of, with those marked
that a model generates. Conversations are drawn at random, with fixed seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import tools

from post_training.common.errors import UsageError
from post_training.data import assistant_mask
from post_training.data.document_formats import Document

SPECIAL = (
    *("<s>", "</s>", "<|start|>", "<|end|>", "<|return|>", "<|im_start|>", "<|im_end|>"),
    *("<|eot|>", "<turn>", "</turn>", "<|user|>", "<|assistant|>", "<|eos|>", "[INST]", "[/INST]"),
)
CONVERSATIONS = 60


@dataclass(frozen=True)
class Form:
    """Text around the turns of a template.

    ``asked`` and ``told`` are before and after a user's and a system's turn, with ROLE for the
    role; ``begin`` is before an answer, ``end`` what the model writes after it, and ``after`` what
    the template adds. ``trims`` says whether contents are stripped; ``last`` is another end of the
    last turn; ``tags`` whether the template marks answers itself.
    """

    asked: str
    told: str
    begin: str
    end: str
    after: str = ""
    trims: bool = False
    last: str = ""
    tags: bool = False
    eos: str = "</s>"

    def template(self) -> str:
        content = "m.content | trim" if self.trims else "m.content"
        end = f"'{self.end}'"
        if self.last:
            end = f"('{self.last}' if loop.last else '{self.end}')"
        answer = f"{{{{ {content} }}}}{{{{ {end} }}}}"
        if self.tags:
            answer = f"{{% generation %}}{answer}{{% endgeneration %}}"
        asked = "{{ '" + self.asked.replace("ROLE", "' + m.role + '") + "' }}"
        return (
            "{% for m in messages %}{% if m.role == 'assistant' %}"
            f"{{{{ '{self.begin}' }}}}{answer}{{{{ '{self.after}' }}}}"
            f"{{% else %}}{asked}{{{{ {content} }}}}{{{{ '{self.told}' }}}}{{% endif %}}"
            "{% endfor %}"
        ).replace("\n", "\\n")

    def pieces(self, turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
        found = []
        for number, (role, content) in enumerate(turns):
            text = content.strip() if self.trims else content
            if role != "assistant":
                found.append((self.asked.replace("ROLE", role) + text + self.told, False))
                continue
            is_last = number == len(turns) - 1
            end = self.last if self.last and is_last else self.end
            found.append((self.begin, False))
            # A conversation that goes on tells no more what ended the turn before.
            ends = self.tags or not self.last or is_last
            found += [(text, True), (end, ends)]
            found.append((self.after, False))
        return found


FORMS = {
    "ChatML": Form(
        "<|im_start|>ROLE\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>", "\n"
    ),
    "white space before the end": Form("<s>[INST] ", " [/INST]", " ", " </s>", trims=True),
    "line break before the end": Form("### ROLE:\n", "\n\n", "### assistant:\n", "\n</s>", "\n"),
    "headers": Form(
        "<|start|>ROLE<|end|>\n\n", "<|eot|>", "<|start|>assistant<|end|>\n\n", "<|eot|>",
        trims=True, eos="<|eot|>",
    ),
    "turns": Form("<turn>ROLE\n", "</turn>\n", "<turn>model\n", "</turn>", "\n", trims=True),
    "instructions": Form("[INST] ", "[/INST]", " ", "</s>"),
    "role tokens": Form("<|user|>\n", "<|end|>\n", "<|assistant|>\n", "<|end|>", "\n"),
    "role tokens without an end": Form("<|user|>", "", "<|assistant|>", ""),
    "joined": Form("<|user|>", "", "<|assistant|>", "<|eos|>", eos="<|eos|>"),
    "words for roles": Form("ROLE: ", "\n", "assistant: ", "</s>", "\n"),
    "words without an end": Form("ROLE: ", "\n", "assistant: ", "", "\n"),
    "channels": Form(
        "<|start|>ROLE<|end|>", "<|end|>", "<|start|>assistant final", "<|end|>", last="<|return|>",
        eos="<|return|>",
    ),
    "marked": Form("<|start|>ROLE", "<|end|>", "", "", tags=True),
    "marked with an end": Form("<|start|>ROLE", "<|end|>", "A: ", "<|end|>", "\n", tags=True),
}  # fmt: skip
WORDS = ("yes", "no", "A", "2 + 2", "it is\nfour", "naïve", "日本", "</b>", "assistant", "[end]")


def tokenizer(template: str, eos: str = "</s>"):
    made = tools.chat_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL), "eos_token": eos})
    made.chat_template = template
    return made


def conversation(draw: random.Random) -> list[tuple[str, str]]:
    turns = [("system", draw.choice(WORDS))] if draw.random() < 0.3 else []
    begins = draw.random() < 0.2  # with an answer
    for number in range(draw.randint(1, 4)):
        if not (begins and number == 0 and not turns):
            turns.append(("user", " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))))
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 3)))
        empty = [""] if any(role == "assistant" for role, _ in turns) else []
        turns.append(("assistant", draw.choice([text, f" {text}", f"{text}\n", *empty])))
    if draw.random() < 0.2:
        turns.append(("user", "and then?"))
    return turns


@pytest.mark.parametrize("name", FORMS)
def test_the_mask_is_what_a_model_would_generate(name):
    form = FORMS[name]
    made = tokenizer(form.template(), form.eos)
    draw = random.Random(0)
    for _ in range(CONVERSATIONS):
        turns = conversation(draw)
        messages = tuple({"role": role, "content": content} for role, content in turns)
        pieces = form.pieces(turns)
        whole = "".join(text for text, _ in pieces)
        assert made.apply_chat_template(list(messages), tokenize=False) == whole
        found = assistant_mask.tokenize(Document("here", messages=messages), made, "--data")
        assert made.decode(found.ids) == whole
        expected = [
            inside
            for text, inside in merged(pieces)
            for _ in made(text, add_special_tokens=False)["input_ids"]
        ]
        assert found.mask == expected, (turns, whole)


def merged(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours of a kind joined, so that tokens are cut as in the whole text."""
    found: list[tuple[str, bool]] = []
    for text, inside in pieces:
        if found and found[-1][1] == inside:
            found[-1] = (found[-1][0] + text, inside)
        else:
            found.append((text, inside))
    return found


CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}


@pytest.mark.parametrize("content", ["", "I will look."])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_tool_call_is_generated_with_its_end(content, goes_on):
    made = tokenizer(CALLING)
    turns = [
        {"role": "user", "content": "Is it sunny?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
    ]
    if goes_on:
        turns += [
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is."},
        ]
    found = assistant_mask.tokenize(Document("here", messages=tuple(turns)), made, "--data")
    shown = assistant_mask.show(found, made, color=False)
    assert f"⟦{content}<call>weather</call><|im_end|>⟧" in shown
    assert shown.count("⟦") == 1 + goes_on
    assert ("⟦It is.<|im_end|>⟧" in shown) == goes_on


def test_a_template_that_rewrites_a_call_is_refused():
    template = CALLING.replace("{% for call", "{{ messages | length }}{% for call")
    turns = (
        {"role": "user", "content": "Is it sunny?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
    )
    with pytest.raises(UsageError, match="cannot be told apart"):
        assistant_mask.tokenize(Document("here", messages=turns), tokenizer(template), "--data")


@pytest.mark.parametrize("key, value", [("weight", 0), ("train", False), ("loss", False)])
def test_an_answer_that_is_context_only_is_not_trained(key, value):
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1][key] = value
    document = Document("here", messages=tuple(messages))
    made = tokenizer(FORMS["ChatML"].template())
    found = assistant_mask.tokenize(document, made, "--data")
    shown = assistant_mask.show(found, made, color=False)
    assert "⟦second<|im_end|>⟧" in shown and shown.count("⟦") == 1
    with pytest.raises(UsageError, match="not to be trained on"):
        assistant_mask.tokenize(document, tokenizer(FORMS["marked"].template()), "--data")
    messages[3][key] = value
    with pytest.raises(UsageError, match="loss mask is empty"):
        assistant_mask.tokenize(Document("here", messages=tuple(messages)), made, "--data")


def test_an_answer_of_half_a_weight_is_refused():
    messages = ({"role": "assistant", "content": "A", "weight": 0.5},)
    made = tokenizer(FORMS["ChatML"].template())
    with pytest.raises(UsageError, match=r"the weight 0\.5"):
        assistant_mask.tokenize(Document("here", messages=messages), made, "--data")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_in_a_field_of_their_own_are_generated(field):
    made = tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m."
        + field
        + " %}<turn>{{ m."
        + field
        + " }}</turn>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    answer = {"role": "assistant", "content": "4", field: "2 + 2"}
    document = Document("here", messages=({"role": "user", "content": "?"}, answer))
    shown = assistant_mask.show(
        assistant_mask.tokenize(document, made, "--data"), made, color=False
    )
    assert "⟦2 + 2</turn>4<|im_end|>⟧" in shown


def test_a_document_is_unchanged_by_its_masking():
    document = Document("here", messages=({"role": "assistant", "content": "A"},))
    made = tokenizer(FORMS["marked"].template())
    before = replace(document)
    assistant_mask.tokenize(document, made, "--data")
    assert document == before
