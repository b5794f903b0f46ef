"""A small synthetic world of facts, and all texts that the tiny model is trained and tested on.

A fact says that an entity has a value for a relation: the climate of Arvon is rainy. Five subjects
of four entities with four relations each make 80 facts. They are drawn once from ``WORLD_SEED`` and
are the same on every machine. The facts appear as

- multiple-choice questions in MMLU's columns and published prompt format,
- conversations in chat-message form (one to three turns, answers of one to five sentences),
- prose paragraphs about one entity,
- drills: questions with their answers, nothing else, from which facts are learned fastest.

The test is held out: no test question occurs in training as a string (its set of options is held
out), and the held-out conversations use a wording that training never uses for those facts. One
thing is easier than in a real exam: a value always stands at the same letter, as in a catalogue.
The score thus shows whether the model knows the fact, not whether it can search a list, which would
take many times the training; knowing only the most frequent letters of a relation's values scores
about 45 %.

This module needs only the standard library.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WORLD_SEED = 2024
LETTERS = "ABCD"
DEV_PER_SUBJECT = 5
TEST_PER_FACT = 3

Message = dict[str, str]
Question = dict[str, Any]  # MMLU's columns: question, subject, choices (4), answer (0-3)


@dataclass(frozen=True)
class Subject:
    """One MMLU subject: its entities, and for each relation the values that occur."""

    name: str
    kind: str
    entities: tuple[str, ...]
    values: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fact:
    """The ``relation`` of ``entity`` is ``value``."""

    subject: str
    entity: str
    relation: str
    value: str


def _subject(name: str, kind: str, entities: str, **values: str) -> Subject:
    relations = {relation: tuple(words.split()) for relation, words in values.items()}
    return Subject(name, kind, tuple(entities.split()), relations)


SUBJECTS = (
    _subject(
        "island_geography",
        "an island",
        "Arvon Belmar Corsa Dunmere",
        capital="Lorna Minster Novara Oakham Pellow Quill Ravenna Selby Tarn Umber",
        export="salt copper timber wool honey silk olives tin cotton pearls",
        climate="rainy dry mild cold humid windy foggy stormy tropical arctic",
        language="Tavi Orlish Kemu Sandic Brell Yoric Pashi Weldan Nokri Fenni",
    ),
    _subject(
        "animal_biology",
        "an animal",
        "bandu corlet dripple fennock",
        food="grass berries fish ants seeds worms roots nectar moss eggs",
        habitat="desert forest river swamp cave meadow reef tundra cliff lagoon",
        enemy="wolf eagle snake shark tiger falcon lynx bear crocodile owl",
        color="red blue green yellow black white brown grey orange purple",
    ),
    _subject(
        "mineral_chemistry",
        "a mineral",
        "adrite bolkite cendrite dorite",
        use="glass paint soap fuel paper steel ink medicine jewelry cement",
        source="volcano lake quarry glacier canyon beach mine geyser crater well",
        solvent="water alcohol vinegar ammonia acetone benzene oil brine ether milk",
        symbol="Ad Bo Ce Dk El Fu Gm Hr Iq Jx",
    ),
    _subject(
        "royal_history",
        "a ruler",
        "Aldric Brenna Cedric Delwyn",
        weapon="sword axe spear bow dagger mace whip hammer sling lance",
        castle="Ashford Blackmoor Crag Drumlin Elmhurst Foxhall Greystone Highgate Irons Keep",
        emblem="lion rose dragon stag swan oak crown serpent tower star",
        title="Bold Wise Cruel Gentle Young Silent Proud Lame Pious Great",
    ),
    _subject(
        "planet_astronomy",
        "a planet",
        "Altus Borea Cygna Deimon",
        moons="one two three four five six seven eight nine ten",
        surface="ice lava sand rock dust metal crystal clay gas mud",
        ring="silver golden crimson violet azure amber ivory scarlet jade bronze",
        discoverer="Kepler Newton Halley Galilei Herschel Cassini Hubble Sagan Tycho Huygens",
    ),
)


def facts() -> list[Fact]:
    """All facts. Within a relation each entity has another value, so that none can be guessed."""
    rng = random.Random(WORLD_SEED)
    return [
        Fact(subject.name, entity, relation, value)
        for subject in SUBJECTS
        for relation, values in subject.values.items()
        for entity, value in zip(subject.entities, rng.sample(values, len(values)), strict=False)
    ]


# Multiple choice


def format_question(question: Question, with_answer: bool) -> str:
    """One question as in the published MMLU prompt; without the answer it ends in ``Answer:``."""
    options = zip(LETTERS, question["choices"], strict=True)
    lines = [question["question"], *(f"{letter}. {choice}" for letter, choice in options)]
    answer = f" {LETTERS[question['answer']]}\n\n" if with_answer else ""
    return "\n".join(lines) + "\nAnswer:" + answer


def exam_header(subject: str) -> str:
    """The published MMLU prompt's first line, for a subject such as ``island_geography``."""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def ask(fact: Fact) -> str:
    return f"What is the {fact.relation} of {fact.entity}?"


class Exams:
    """Draws multiple-choice questions; keeps the test's option sets out of the training's.

    ``dev`` has five questions per subject, about facts that ``test`` does not ask; ``test`` has
    three questions for each other fact. A value's place in its relation decides its letter.
    """

    def __init__(self) -> None:
        rng = random.Random(WORLD_SEED + 1)
        self._pools = {
            (subject.name, relation): values
            for subject in SUBJECTS
            for relation, values in subject.values.items()
        }
        self._held_out: set[tuple[Fact, frozenset[str]]] = set()
        self.dev: list[Question] = []
        self.test: list[Question] = []
        self.by_subject: dict[str, list[Fact]] = {subject.name: [] for subject in SUBJECTS}
        for fact in facts():
            self.by_subject[fact.subject].append(fact)
        for subject_facts in self.by_subject.values():
            order = rng.sample(subject_facts, len(subject_facts))
            for fact in order[:DEV_PER_SUBJECT]:
                self.dev.append(self._draw(fact, rng))
            for fact in order[DEV_PER_SUBJECT:]:
                for _ in range(TEST_PER_FACT):
                    question = self._draw(fact, rng)
                    self._held_out.add((fact, frozenset(question["choices"])))
                    self.test.append(question)

    def _draw(self, fact: Fact, rng: random.Random) -> Question:
        """A question about ``fact`` whose options no held-out question has."""
        values = self._pools[fact.subject, fact.relation]
        answer = values.index(fact.value) % len(LETTERS)
        while True:
            choices = [rng.choice(values[place :: len(LETTERS)]) for place in range(len(LETTERS))]
            choices[answer] = fact.value
            if (fact, frozenset(choices)) not in self._held_out:
                break
        return {
            "question": ask(fact),
            "subject": fact.subject,
            "choices": choices,
            "answer": answer,
        }

    def training_exam(self, rng: random.Random, questions: int) -> str:
        """A header and ``questions`` answered questions of one subject, none of them a test's."""
        subject = rng.choice(SUBJECTS).name
        drawn = rng.sample(self.by_subject[subject], questions)
        return exam_header(subject) + "".join(
            format_question(self._draw(fact, rng), with_answer=True) for fact in drawn
        )


# Conversations and prose

Turn = tuple[str, str]  # what the user says, what the assistant answers

HELD_OUT_PER_FORM = 10
COMPARISONS_PER_RELATION = 4


def _turns() -> dict[str, list[Turn]]:
    """Every turn of every form. The form of the answer follows from the form of the question, so a
    trained model is sure of each token and greedy decoding does not hang on rounding errors."""
    by_entity: dict[str, dict[str, str]] = {}
    for fact in facts():
        by_entity.setdefault(fact.entity, {})[fact.relation] = fact.value
    rng = random.Random(WORLD_SEED + 2)
    turns: dict[str, list[Turn]] = {
        form: [] for form in ("ask", "which", "polite", "tell", "list", "compare")
    }
    for fact in facts():
        e, r, v = fact.entity, fact.relation, fact.value
        sentence = f"The {r} of {e} is {v}."
        turns["ask"].append((ask(fact), sentence))
        turns["which"].append((f"Which {r} does {e} have?", f"{e} has {v} as its {r}."))
        topic = fact.subject.replace("_", " ")
        answer = f"Yes, I do. {sentence} This is a fact of {topic}."
        turns["polite"].append((f"Do you know the {r} of {e}?", answer))
    for subject in SUBJECTS:
        for e in subject.entities:
            known = by_entity[e]
            turns["tell"].append((f"Tell me about {e}.", describe(e, subject, known, list(known))))
            for r in known:
                s = rng.choice([other for other in known if other != r])
                answer = f"The {r} of {e} is {known[r]}, and its {s} is {known[s]}."
                turns["list"].append((f"List the {r} and the {s} of {e}.", answer))
        for r in subject.values:
            pairs = list(itertools.permutations(subject.entities, 2))
            for e, f in rng.sample(pairs, COMPARISONS_PER_RELATION):
                v, w = by_entity[e][r], by_entity[f][r]
                answer = f"The {r} of {e} is {v}, while the {r} of {f} is {w}. They differ."
                turns["compare"].append((f"Compare the {r} of {e} and {f}.", answer))
    return {form: rng.sample(some, len(some)) for form, some in turns.items()}


def describe(entity: str, subject: Subject, known: dict[str, str], order: list[str]) -> str:
    """A paragraph of five sentences that names the entity's facts in ``order``."""
    sentences = [f"{entity} is {subject.kind}."]
    sentences += [f"The {relation} of {entity} is {known[relation]}." for relation in order]
    return " ".join(sentences)


def conversations(rng: random.Random, passes: int) -> list[list[Message]]:
    """Training conversations of one to three turns; each turn that is not held out occurs
    ``passes`` times."""
    turns = [turn for some in _turns().values() for turn in some[HELD_OUT_PER_FORM:]]
    result: list[list[Message]] = []
    for _ in range(passes):
        rest = iter(rng.sample(turns, len(turns)))
        while group := [turn for turn, _ in zip(rest, range(rng.randint(1, 3)), strict=False)]:
            result.append(messages(group))
    return result


def held_out_conversations() -> list[list[Message]]:
    """Conversations of one turn, ``HELD_OUT_PER_FORM`` of each form. Training never asks these in
    conversation."""
    return [messages([turn]) for some in _turns().values() for turn in some[:HELD_OUT_PER_FORM]]


def messages(turns: list[Turn]) -> list[Message]:
    """Turns as chat messages."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def drill(rng: random.Random, questions: int) -> list[tuple[str, str]]:
    """Questions of one subject, each with its answer: ``What is the food of bandu?``, ants."""
    subject = rng.choice(SUBJECTS).name
    drawn = rng.sample([fact for fact in facts() if fact.subject == subject], questions)
    return [(ask(fact), f" {fact.value}") for fact in drawn]


def paragraphs(rng: random.Random) -> Iterator[str]:
    """One paragraph about each entity, its facts in random order."""
    known: dict[str, dict[str, str]] = {}
    for fact in facts():
        known.setdefault(fact.entity, {})[fact.relation] = fact.value
    for subject in SUBJECTS:
        for entity in subject.entities:
            order = rng.sample(sorted(known[entity]), len(known[entity]))
            yield describe(entity, subject, known[entity], order)
