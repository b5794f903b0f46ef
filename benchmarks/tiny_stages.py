"""Every stage on a tiny random model, as processes that can be watched and ended from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from random_model import CHAT_TEMPLATE, byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds for one run
TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
_MARK = "RELIABILITY_RUN"  # in the environment of every process of a run
# What torchrun says when one of its processes fails: not a traceback of a stage.
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)")
_TORCHRUN = "torch.distributed.elastic."


@dataclass
class Inputs:
    """What the stages read, made once in the folder ``work``."""

    work: Path
    model: Path = field(init=False)
    chat: Path = field(init=False)
    questions: Path = field(init=False)
    checkpoint: Path = field(init=False)
    drafted: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.chat = self.work / "model", self.work / "chat.jsonl"
        self.questions = self.work / "questions"
        self.checkpoint, self.drafted = self.work / "checkpoint", self.work / "drafted"

    def make(self) -> None:
        """Raises RuntimeError if a stage that makes one fails."""
        if self.drafted.exists():
            return
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**TINY), dtype=torch.bfloat16)
        model.save_pretrained(self.model)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(self.model)
        turns = [
            [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
            for i in range(60)
        ]
        self.chat.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
        self.questions.mkdir()
        row = {"subject": "art", "choices": ["red", "green", "blue", "grey"]}
        for split, count in (("test", 12), ("dev", 5)):
            lines = [
                json.dumps({**row, "question": f"{split} {i}?", "answer": i % 4}) + "\n"
                for i in range(count)
            ]
            (self.questions / f"{split}.jsonl").write_text("".join(lines))
        load = ("--pretrained-model-path", str(self.model))
        for more in (
            ["--save", str(self.checkpoint)],
            ["--algorithm", "eagle3", "--save", str(self.drafted)],
        ):
            run = Run(["convert.py", *load, *more], self.work / "log")
            if run.wait():
                raise RuntimeError(f"{run.words} failed:\n{run.said()}")


# Stage -> its command without the output, and the flag of the output.
STAGES: dict[str, tuple[Callable[[Inputs], list[object]], str]] = {
    "convert": (lambda i: ["--pretrained-model-path", i.model], "--save"),
    "quantize": (
        lambda i: [
            *("--load", i.checkpoint, "--export-quant-cfg", "FP8_DEFAULT_CFG", "--calib-size", 8),
            *("--calib-max-sequence-length", 64, "--calib-dataset-path-or-name", i.chat),
            "--skip-generate",
        ],
        "--save",
    ),
    "prune": (
        lambda i: [
            *("--load", i.checkpoint, "--prune-export-config", '{"ffn_hidden_size": 128}'),
            *("--calib-dataset", i.chat, "--calib-size", 8, "--calib-max-sequence-length", 64),
            "--skip-generate",
        ],
        "--save",
    ),
    "export": (lambda i: ["--load", i.checkpoint], "--export-dir"),
    # quantize, and export in the same process.
    "quantize_export": (
        lambda i: [
            *("--pretrained-model-path", i.model, "--export-quant-cfg", "FP8_DEFAULT_CFG"),
            *("--calib-size", 8, "--calib-max-sequence-length", 64),
            *("--calib-dataset-path-or-name", i.chat, "--skip-generate"),
        ],
        "--export-dir",
    ),
    "finetune": (
        lambda i: [
            *("--load", i.checkpoint, "--finetune-data-files", i.chat, "--train-iters", 6),
            *("--save-interval", 2, "--seq-length", 64, "--eval-iters", 0),
        ],
        "--save",
    ),
    "evaluate": (
        lambda i: [
            *("--load", i.checkpoint, "--reference", i.model, "--text", i.chat),
            *("--mmlu-dataset", i.questions),
        ],
        "--evaluate-output",
    ),
    "distill": (
        lambda i: [
            *("--load", i.checkpoint, "--teacher", i.model, "--finetune-data-files", i.chat),
            *("--train-iters", 6, "--save-interval", 2, "--seq-length", 64, "--eval-iters", 0),
        ],
        "--save",
    ),
    "eagle3": (
        lambda i: [
            *("--load", i.drafted, "--finetune-data-files", i.chat, "--train-iters", 6),
            *("--save-interval", 2, "--seq-length", 64, "--eval-iters", 0),
        ],
        "--save",
    ),
    "extract_features": (
        lambda i: [
            *("--load", i.drafted, "--finetune-data-files", i.chat, "--seq-length", 64),
            *("--num-samples", 32, "--shard-size", 4),
        ],
        "--output-dir",
    ),
    "generate": (
        lambda i: ["--load", i.checkpoint, "--prompts-path", i.chat, "--max-new-tokens", 8],
        "--output",
    ),
    "mmlu": (lambda i: ["--load", i.checkpoint, "--mmlu-dataset", i.questions], "--mmlu-output"),
    "validate": (
        lambda i: ["--load", i.drafted, "--prompts-path", i.chat, "--osl", 8, "--steps", 2],
        "--validate-output",
    ),
}
TRAINING = ("distill", "eagle3", "finetune")
RESUMED = (*TRAINING, "extract_features", "generate")
REPORTS = ("mmlu", "validate", "evaluate")
_ENDINGS = {**dict.fromkeys(REPORTS, ".json"), "generate": ".jsonl"}
_PROGRAMS = {"quantize_export": "quantize"}


@dataclass(frozen=True)
class Variety:
    """A stage and its number of tensor-parallel processes: ``convert``, ``convert@2``."""

    name: str

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"{self.name}: one of {', '.join(STAGES)}, with @2 or without")

    @property
    def stage(self) -> str:
        return self.name.partition("@")[0]

    @property
    def processes(self) -> int:
        return int(self.name.partition("@")[2] or 1)

    @property
    def output_name(self) -> str:
        return f"output{_ENDINGS.get(self.stage, '')}"

    def words(self, inputs: Inputs, output: Path) -> list[str]:
        given, flag = STAGES[self.stage]
        program = _PROGRAMS.get(self.stage, self.stage)
        words = [f"{program}.py", *map(str, given(inputs)), flag, str(output)]
        if self.processes == 1:
            return words
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        return [
            *launcher,
            f"--nproc_per_node={self.processes}",
            *words,
            *("--tensor-model-parallel-size", str(self.processes)),
        ]


@dataclass
class Run:
    """A program of this repository that runs or has run; its output goes to the file ``log``."""

    words: list[str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: self.mark},
                start_new_session=True,
            )

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code; None where it still runs."""
        try:
            return self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def works(self) -> bool:
        """Wait until it has started up and begins its work. False if it ended before."""
        while self.process.poll() is None:
            if ": TP=" in self.said():  # the line on processes and devices
                return True
            time.sleep(0.005)
        return False

    def children(self) -> list[int]:
        """The processes that it started, directly or not, without itself."""
        mark = f"{_MARK}={self.mark}".encode()
        return [pid for pid in _running() if pid != self.process.pid and mark in _environment(pid)]

    def send(self, number: int) -> None:
        """Send a signal to all its processes, as a terminal does."""
        for pid in (self.process.pid, *self.children()):
            send(pid, number)

    def processes_left(self, seconds: float = 5) -> bool:
        """Whether one of its processes lives on for so long; it is then killed."""
        end = time.monotonic() + seconds
        while self.children():
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                return True
            time.sleep(0.1)
        return False

    def tracebacks(self) -> int:
        """How many tracebacks it printed.

        Torchrun's own about a failed process do not count, nor Python's about a Ctrl-C before the
        stage has said a word: while it is imported.
        """
        said = self.said()
        last = [found[1] for found in _TRACEBACK.finditer(said)]
        if not re.search(r"^\[\w+\] ", said, re.MULTILINE):
            last = [line for line in last if line != "KeyboardInterrupt"]
        return sum(not line.startswith(_TORCHRUN) for line in last)


def send(pid: int, number: int) -> None:
    """Send a signal to a process, which may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _running() -> list[int]:
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal()]


def _environment(pid: int) -> bytes:
    """A process's environment; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
