"""GSM8K: word problems, the published prompt of eight solved ones, and how an answer is judged.

The prompt is that of Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language
Models" (2022, table 20), in the form in which lm-evaluation-harness asks it (task ``gsm8k_cot``)::

    Q: <question>
    A: <reasoning> The answer is <number>.

    Q: <question>
    A:

The eight solved problems are read from the installed lm-evaluation-harness, or from a file. An
answer ends before ``Q:``; two ways to judge it are usual, and both are reported. Strict: the number
after the first ``The answer is``. Flexible: the last number. Pure Python: nothing here imports
torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from post_training.common import forms, inputs
from post_training.common.errors import UsageError
from post_training.data import records

OPTION, PROMPT_OPTION = "--gsm8k-dataset", "--gsm8k-prompt"
HUB = "openai/gsm8k"
STOPS = ("Q:", "</s>", "<|im_end|>")
NO_ANSWER = "[invalid]"
_TASK = "tasks/gsm8k/gsm8k-cot.yaml"  # of lm-evaluation-harness
_STRICT = re.compile(r"The answer is (-?[0-9.,]+).")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True)
class Problem:
    """``target`` is the right number; of a solved problem, the reasoning that ends in it."""

    question: str
    target: str


@dataclass(frozen=True)
class Problems:
    """What is asked, and the solved ones before each."""

    test: Sequence[Problem]
    examples: Sequence[Problem]


def prompt(problem: Problem, examples: Sequence[Problem]) -> str:
    """The solved problems, then the question up to ``A:``."""
    solved = [f"Q: {each.question}\nA: {each.target}\n\n" for each in examples]
    return "".join([*solved, f"Q: {problem.question}\nA:"])


def cut(text: str, stops: Iterable[str] = STOPS) -> str:
    """An answer up to where the next question begins."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def strict(text: str) -> str:
    """The number of the first ``The answer is``."""
    found = _STRICT.search(text)
    return found[1].strip() if found else NO_ANSWER


def flexible(text: str) -> str:
    """The last number of the text."""
    found = _FLEXIBLE.findall(text)
    return found[-1].strip() if found else NO_ANSWER


def is_right(given: str, target: str) -> bool:
    """Whether it is the same number, but for commas, dollar signs and a full stop at its end."""
    return _plain(given) == _plain(target)


def _plain(number: str) -> str:
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", "")).lower()


def load(source: str) -> list[Problem]:
    """The test questions of a file, a folder with ``test.*``, or the hub.

    Raises:
        UsageError: nothing to read, or rows without question and answer.
    """
    rows: Iterable[records.Row]
    if records.is_local(source):
        paths = _test_files(inputs.expanded(source))
        rows = chain.from_iterable(records.read(path, OPTION) for path in paths)
    else:
        rows = records.hub_rows(source, OPTION, configuration="main", split="test", stream=False)
    found = []
    for place, values in rows:
        question, answer = values.get("question"), values.get("answer")
        if not (isinstance(question, str) and isinstance(answer, str)):
            raise UsageError(
                f"{OPTION} {place}",
                f"it lacks question or answer as text; it has {', '.join(values) or 'nothing'}",
                "give GSM8K's columns question and answer; the number follows ####",
            )
        found.append(Problem(question, answer.split("####")[-1].strip()))
    if not found:
        raise UsageError(f"{OPTION} {source}", "it holds no question", "give a test split")
    return found


def _test_files(path: Path) -> list[Path]:
    """The file itself, or the test split of a folder or of a clone of the hub's."""
    found = records.list_files(path, OPTION)
    if path.is_file():
        return found
    # The hub's has the same questions a second time, with other answers, in "socratic".
    tests = [p for p in found if re.fullmatch(r"test(-\d+-of-\d+)?", p.stem)]
    tests = [p for p in tests if p.parent.name != "socratic"]
    if not tests or len({(p.parent, p.suffix) for p in tests}) > 1:
        cause = f"it has {len(tests)} files of a test split" if tests else "it has no test split"
        raise UsageError(f"{OPTION} {path}", cause, "name the file, such as test.jsonl")
    return tests


def examples(path: str | None, count: int) -> list[Problem]:
    """The first ``count`` solved problems of a prompt file, by default of lm-evaluation-harness.

    Raises:
        UsageError: if there is no such file, it has fewer, or it is of another form.
    """
    file = prompt_file(path, count)
    if file is None:
        return []
    what = f"{PROMPT_OPTION} {file}"
    remedy = "give a YAML file with fewshot_config: samples: [{question: ..., target: ...}]"
    content = forms.read_yaml(file, what, remedy)
    configured = content.get("fewshot_config") if isinstance(content, dict) else None
    samples: Any = configured.get("samples") if isinstance(configured, dict) else None
    if not isinstance(samples, list) or not all(_is_sample(each) for each in samples):
        raise UsageError(what, "it has no list of solved problems", remedy)
    if len(samples) < count:
        cause = f"{what} has {len(samples)} solved problems"
        raise UsageError(f"--gsm8k-shots {count}", cause, f"give at most {len(samples)}")
    return [Problem(each["question"], each["target"]) for each in samples[:count]]


def prompt_file(path: str | None, count: int) -> Path | None:
    """Where ``count`` solved problems are read; None if there are to be none."""
    if count == 0:
        return None
    return inputs.expanded(path) if path else _installed()


def _is_sample(value: Any) -> bool:
    fields = ("question", "target")
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in fields)


def _installed() -> Path:
    """The prompt file of the installed lm-evaluation-harness, which is not imported."""
    found = importlib.util.find_spec("lm_eval")
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / _TASK).is_file():
            return Path(folder) / _TASK
    raise UsageError(
        f"{PROMPT_OPTION} (not given)",
        "the eight solved problems are read from lm-evaluation-harness, which is not installed",
        "pip install lm_eval==0.4.13, or give its gsm8k-cot.yaml, or --gsm8k-shots 0",
    )
