"""Attack every stage and count what is lost: kills, signals, flipped bits, full disks, two at once.

    PYTHONPATH=. python benchmarks/reliability.py kills --rounds 20 --work /tmp/reliability
    PYTHONPATH=. python benchmarks/reliability.py disks --stages convert,export    (root: mounts)

The stages run as users run them, on a tiny random model. A failure is printed with the command and
its output; the table at the end says what was tried, and is appended as JSON to results.jsonl in
the work folder. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from random_model import CHAT_TEMPLATE, byte_tokenizer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from post_training.common import files, manifest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds for one run
ENDINGS = {0, 1, 2, 69, 75, 128 + signal.SIGINT, 128 + signal.SIGTERM}
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


@dataclass
class Inputs:
    """What the stages read, made once in the work folder."""

    work: Path
    model: Path = field(init=False)
    chat: Path = field(init=False)
    questions: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.chat = self.work / "model", self.work / "chat.jsonl"
        self.questions = self.work / "questions"

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoint"

    @property
    def drafted(self) -> Path:
        return self.work / "drafted"

    def make(self) -> None:
        if self.drafted.exists():
            return
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

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
        require(["convert.py", *load, "--save", str(self.checkpoint)])
        require(["convert.py", *load, "--algorithm", "eagle3", "--save", str(self.drafted)])


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


@dataclass
class Run:
    """A stage that runs or has run; its output goes to a file, which no full pipe can stop."""

    words: list[str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *self.words],
                cwd=ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def wait(self, seconds: float = LIMIT) -> int | None:
        """The exit code; None where it still runs."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def processes_left(self) -> bool:
        """Whether one of its group lives on after two seconds."""
        for _ in range(20):
            if not any(_group(pid) == self.process.pid for pid in _processes()):
                return False
            time.sleep(0.1)
        os.killpg(self.process.pid, signal.SIGKILL)
        return True


def _processes() -> Iterator[int]:
    return (int(each.name) for each in Path("/proc").iterdir() if each.name.isdecimal())


def _group(pid: int) -> int | None:
    """A process's group; None for one that has ended."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(group)


def require(words: list[str], log: Path = Path(os.devnull)) -> None:
    """Run a stage to its end.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{done.stderr}")


@dataclass
class Trial:
    """One stage under attack."""

    stage: str
    inputs: Inputs
    folder: Path

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        ending = {"mmlu": ".json", "validate": ".json", "generate": ".jsonl"}.get(self.stage, "")
        self.output = self.folder / f"output{ending}"

    def words(self, output: Path | None = None) -> list[str]:
        given, flag = STAGES[self.stage]
        words = [f"{self.stage}.py", *map(str, given(self.inputs))]
        return [*words, flag, str(output or self.output)]

    def start(self, *more: str, output: Path | None = None, name: str = "log") -> Run:
        return Run([*self.words(output), *more], self.folder / name)

    def problem(self) -> str:
        """What is wrong with the output as it lies there; empty if it is whole or missing."""
        if not self.output.exists():
            return ""
        if self.output.is_file() and self.stage != "generate":
            json.loads(self.output.read_text())
            return ""
        record = self.output
        if self.stage == "generate":
            record = self.output.with_name(f"{self.output.name}.run.json")
        content = manifest.read(record)
        if content is None:
            # generate, extract_features and training may be resumed: the next run judges them.
            resumed = ("generate", "extract_features", "eagle3", "distill")
            return "" if self.stage in resumed else "no manifest"
        folder = self.output if self.output.is_dir() else self.output.parent
        damaged = manifest.damaged_outputs(folder, content)
        return f"damaged: {damaged}" if damaged else ""


def kills(trial: Trial, rounds: int, number: int = signal.SIGKILL) -> Iterator[str]:
    """Send a signal at moments spread over the run; then the same command must succeed."""
    began = time.monotonic()
    run = trial.start()
    if run.wait() not in (0, 1):
        yield f"without a signal: {run.said()}"
        return
    seconds = time.monotonic() - began
    for turn in range(rounds):
        if turn % 2 == 0:  # else over the finished output
            trial.__post_init__()
        run = trial.start("--overwrite")
        moment = seconds * (turn + 0.5) / rounds
        code = run.wait(moment)
        if code is None:
            os.killpg(run.process.pid, number)
            code = run.wait(60)
        at = f"signal {number} after {moment:.1f} of {seconds:.1f} s"
        if code is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            yield f"{at}: it did not end within 60 s\n{run.said()}"
        elif code not in ENDINGS and code != -number:
            yield f"{at}: exit code {code}\n{run.said()}"
        if "Traceback" in run.said():
            yield f"{at}: a traceback\n{run.said()}"
        if run.processes_left():
            yield f"{at}: a process is left"
        if problem := trial.problem():
            yield f"{at}: {problem}"
        run = trial.start("--overwrite", name="again")
        if run.wait() not in (0, 1):
            yield f"{at}: the next run fails\n{run.said()}"
        elif problem := trial.problem():
            yield f"{at}: after the next run {problem}"
        else:
            yield ""


def interrupts(trial: Trial, rounds: int) -> Iterator[str]:
    """The same with Ctrl-C and SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        yield from kills(trial, (rounds + 1) // 2, number)


def flips(trial: Trial, rounds: int) -> Iterator[str]:
    """Flip a bit of a large file of the output: who reads it next must refuse it."""
    reader = {"export": ["mmlu.py", "--mmlu-dataset", str(trial.inputs.questions)]}
    readers = {"convert": "export", "quantize": "export", "prune": "export"}
    if trial.stage not in (*readers, *reader):
        return
    require(trial.words())
    generator = random.Random(0)
    for turn in range(rounds):
        candidates = [path for path in files.tree(trial.output) if path.stat().st_size > 4096]
        path = generator.choice(candidates)
        at, bit = generator.randrange(path.stat().st_size), 1 << generator.randrange(8)
        _flip(path, at, bit)
        source = ["--load", str(trial.output)]
        if trial.stage == "export":
            words = [*reader["export"], "--pretrained-model-path", str(trial.output)]
        else:
            words = ["export.py", *source, "--export-dir", str(trial.folder / f"next{turn}")]
        run = Run(words, trial.folder / "log")
        code = run.wait()
        _flip(path, at, bit)
        refused = code == 2 and path.name in run.said()
        yield "" if refused else f"{path.name}, byte {at}: exit code {code}\n{run.said()}"


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        value = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([value ^ bit]))


def disks(trial: Trial, rounds: int) -> Iterator[str]:
    """A disk that is full after a part of the output: an error, no traceback, nothing lost."""
    run = trial.start()
    if run.wait() not in (0, 1):
        yield f"with room: {run.said()}"
        return
    size = files.size_of(trial.folder)
    for turn in range(rounds):
        disk = trial.folder / f"disk{turn}"
        disk.mkdir()
        room = max(4096, int(size * (turn + 0.5) / rounds))
        options = f"size={room}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
        try:
            run = trial.start(output=disk / trial.output.name)
            code = run.wait()
            said = run.said()
            good = code in (0, 1, 2) and "Traceback" not in said
            yield "" if good else f"{room} bytes: exit code {code}\n{said}"
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def together(trial: Trial, rounds: int) -> Iterator[str]:
    """Two runs at once with one output: one makes it, the other is refused."""
    for turn in range(rounds):
        trial.__post_init__()
        first = trial.start(name="first")
        time.sleep(turn * 0.5)
        second = trial.start(name="second")
        codes = sorted((first.wait() or 0, second.wait() or 0))
        problem = trial.problem()
        if codes not in ([0, 2], [1, 2]) or problem:
            yield f"exit codes {codes}, {problem}\n{first.said()}\n{second.said()}"
        else:
            yield ""


ATTACKS = {
    "kills": kills, "interrupts": interrupts, "flips": flips, "disks": disks, "together": together
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--stages", default=",".join(STAGES), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="per stage (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/reliability"), help="(%(default)s)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    inputs = Inputs(args.work)
    inputs.make()
    table = Table("attack", "stage", "tried", "failed", "minutes", title="reliability")
    failed = 0
    for stage in args.stages.split(","):
        trial = Trial(stage, inputs, args.work / f"{args.attack}-{stage}")
        began, tried, bad = time.monotonic(), 0, 0
        for found in tqdm(ATTACKS[args.attack](trial, args.rounds), desc=stage, unit="run"):
            tried += 1
            if found:
                bad += 1
                tqdm.write(f"{stage}: {found}")
        minutes = (time.monotonic() - began) / 60
        table.add_row(args.attack, stage, str(tried), str(bad), f"{minutes:.1f}")
        row = {"attack": args.attack, "stage": stage, "tried": tried, "failed": bad}
        with (args.work / "results.jsonl").open("a") as stream:
            stream.write(json.dumps({**row, "minutes": round(minutes, 1)}) + "\n")
        failed += bad
    Console().print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
