"""Attack every stage and count what is lost: kills, signals, flipped bits, full disks, two at once.

    PYTHONPATH=. python benchmarks/reliability.py kills --rounds 20 --work /tmp/reliability
    PYTHONPATH=. python benchmarks/reliability.py disks --stages convert,export    (root: mounts)
    PYTHONPATH=. python benchmarks/reliability.py kills,interrupts --stages convert@2,eagle3@2

The stages run as users run them, on a tiny random model; ``@2`` is on two processes, by torchrun.
Each round is independent, with a folder of its own, which stays where it failed. What a round does
follows from its attack, stage and number alone. Every round is a line of results.jsonl in the work
folder; the table at the end counts failures / rounds. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from stage_outputs import damage, differences, is_whole
from tiny_stages import RESUMED, STAGES, TRAINING, Inputs, Run, Variety, send
from tqdm import tqdm

from post_training.common import files, hashing

UNFINISHED = 75


_PAGE = 4096  # what a tmpfs gives a file at a time


@dataclass
class Finished:
    """A run that nothing disturbed: its output, and how long it took to start up and to work."""

    variety: Variety
    inputs: Inputs
    folder: Path
    start_up: float = field(init=False)
    work: float = field(init=False)

    @property
    def output(self) -> Path:
        return self.folder / self.variety.output_name

    def make(self) -> Finished:
        """Raises RuntimeError if the stage fails."""
        self.folder.mkdir(parents=True)
        began = time.monotonic()
        run = Run(self.variety.words(self.inputs, self.output), self.folder / "log")
        run.works()
        self.start_up = time.monotonic() - began
        code = run.wait()
        self.work = time.monotonic() - began - self.start_up
        if code or damage(self.variety, self.output):
            raise RuntimeError(f"{run.words} ended with {code}:\n{run.said()}")
        return self

    def copy_to(self, folder: Path) -> None:
        """Put its output, with what lies beside it, into another folder."""
        for path in self.folder.iterdir():
            if path.name != "log":
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, folder / path.name)


@dataclass
class Round:
    """One attack on one stage; ``number`` decides, with their names, what is done exactly."""

    attack: str
    variety: Variety
    number: int
    finished: Finished
    folder: Path

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.attack} {self.variety.name} {self.number}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.output = self.folder / self.variety.output_name
        self.replaces = self.number % 2 == 1  # a finished output lies there
        if self.replaces:
            self.finished.copy_to(self.folder)

    def start(self, name: str, *more: str, output: Path | None = None) -> Run:
        words = self.variety.words(self.finished.inputs, output or self.output)
        if self.replaces:
            words.append("--overwrite")
        return Run([*words, *more], self.folder / f"{name}.log")


def lost(attacked: Round, output: Path) -> str:
    """What an attack took or broke; empty if nothing."""
    if problem := damage(attacked.variety, output):
        return problem
    kept = [output, files.previous(output)]
    if not attacked.replaces or any(is_whole(attacked.variety, path) for path in kept):
        return ""
    # A run that replaces another grows in place, and drops the other when it can be resumed itself.
    if attacked.variety.stage in RESUMED and output.exists():
        return ""
    rows = files.incomplete(output)  # of generate, which the next run gives their name
    if rows.is_file() and hashing.describe(rows) == hashing.describe(attacked.finished.output):
        return ""
    return "the earlier output is lost"


def succeeds(attacked: Round, name: str, output: Path) -> str:
    """Why the same command, given again, does not end well; empty if it does."""
    run = attacked.start(name, output=output)
    code = run.wait()
    refused = ("made by this same command", "it exists, complete", "extract_features, finished")
    if code and any(words in run.said() for words in refused):
        code = 0  # the first had finished
    if code != 0:
        return f"the next run ends with {code}\n{run.said()}"
    if not is_whole(attacked.variety, output):
        return f"after the next run: {damage(attacked.variety, output) or 'no output'}"
    if different := differences(attacked.variety, attacked.finished.output, output):
        return f"the next run computes something else: {', '.join(different)}"
    left = sorted(
        path.name
        for path in output.parent.iterdir()
        if path.suffix != ".log" and not (attacked.finished.folder / path.name).exists()
    )
    return f"left behind after the next run: {', '.join(left)}" if left else ""


def _strike(attacked: Round, number: int) -> str:
    """Send a signal at a random moment; then the same command must succeed."""
    chosen, plain = attacked.random, attacked.variety.processes == 1
    run = attacked.start("struck")
    if chosen.random() < 0.25:
        at = chosen.random() * attacked.finished.start_up
        moment = f"{at:.2f} s after its start"
        code = run.wait(at)
    else:
        run.works()
        at = chosen.random() * attacked.finished.work
        moment = f"{at:.2f} s after its work began"
        code = run.wait(at)
    target = "all processes"
    if code is None:
        everyone = [run.process.pid, *run.children()]
        if number == signal.SIGKILL and chosen.random() < 0.5:
            # As the kernel does where memory is short.
            one = chosen.choice(everyone)
            target = "the first process" if one == run.process.pid else "one process"
            send(one, number)
        else:
            run.send(number)
            if number != signal.SIGKILL and chosen.random() < 0.3:
                time.sleep(chosen.random())
                target = "all processes, twice"
                run.send(number)
        code = run.wait(90)
    what = f"{signal.Signals(number).name} to {target}, {moment}: "
    if code is None:
        run.send(signal.SIGKILL)
        return f"{what}it did not end within 90 s\n{run.said()}"
    endings = {0, -number, 128 + number}
    if number == signal.SIGKILL:
        endings |= set() if plain and target != "one process" else {0, 1}
    elif attacked.variety.stage in TRAINING:
        endings.add(UNFINISHED)
    if not plain:
        endings.add(1)  # torchrun's own
    if code not in endings:
        return f"{what}exit code {code}\n{run.said()}"
    if run.tracebacks():
        return f"{what}a traceback\n{run.said()}"
    if run.processes_left():
        return f"{what}a process is left"
    if problem := lost(attacked, attacked.output):
        return f"{what}{problem}"
    problem = succeeds(attacked, "again", attacked.output)
    return problem and f"{what}{problem}"


def kills(attacked: Round) -> str:
    """``kill -9`` of all processes, or of one."""
    return _strike(attacked, signal.SIGKILL)


def interrupts(attacked: Round) -> str:
    """Ctrl-C or SIGTERM, once or twice."""
    return _strike(attacked, signal.SIGINT if attacked.number % 4 < 2 else signal.SIGTERM)


def flips(attacked: Round) -> str:
    """Flip a bit of a large file of the output: who reads it next must refuse it, by name."""
    output, chosen = attacked.output, attacked.random
    if not attacked.replaces:
        attacked.finished.copy_to(attacked.folder)
    large = [path for path in files.tree(output) if path.stat().st_size > 4096]
    if attacked.variety.stage in TRAINING:
        newest = (output / "latest_checkpointed_iteration.txt").read_text().strip()
        large = [path for path in large if path.parent.name == f"iter_{int(newest):07d}"]
    path = chosen.choice(large)
    at, bit = chosen.randrange(path.stat().st_size), 1 << chosen.randrange(8)
    with path.open("r+b") as stream:
        stream.seek(at)
        value = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([value ^ bit]))
    words = READERS[attacked.variety.stage](attacked)
    run = Run(words, attacked.folder / "reader.log")
    code = run.wait()
    if code == 2 and path.name in run.said():
        return ""
    return f"{path.name}, byte {at}: exit code {code}\n{run.said()}"


def _export(attacked: Round) -> list[str]:
    return ["export.py", "--load", str(attacked.output), "--export-dir", f"{attacked.folder}/next"]


def _train(attacked: Round) -> list[str]:
    words = [str(each) for each in STAGES["eagle3"][0](attacked.finished.inputs)]
    at = words.index("--finetune-data-files")
    words[at : at + 2] = ["--offline-distillation-data", str(attacked.output)]
    # A shard is judged when its first row is read: read all.
    words[words.index("--train-iters") + 1] = "40"
    words[words.index("--eval-iters") + 1] = "1"
    return ["eagle3.py", *words, "--save", f"{attacked.folder}/next"]


def _score(attacked: Round) -> list[str]:
    questions = ["--mmlu-dataset", str(attacked.finished.inputs.questions)]
    load = ["--pretrained-model-path", str(attacked.output)]
    return ["mmlu.py", *load, *questions, "--mmlu-output", f"{attacked.folder}/next.json"]


def _evaluate(attacked: Round) -> list[str]:
    load = ["--pretrained-model-path", str(attacked.output), "--weights-only"]
    text = ["--text", str(attacked.finished.inputs.chat)]
    return ["evaluate.py", *load, *text, "--evaluate-output", f"{attacked.folder}/next.json"]


# Stage -> the command that reads its output.
READERS: dict[str, Callable[[Round], list[str]]] = {
    **dict.fromkeys(("convert", "quantize", "prune", "distill", "finetune", "eagle3"), _export),
    "export": _score,
    "quantize_export": _evaluate,
    "extract_features": _train,
}


def disks(attacked: Round) -> str:
    """A disk that is full after a part of the output: an error, nothing lost; then with room."""
    sizes = [path.stat().st_size for path in files.tree(attacked.finished.folder)]
    size = sum(-(-each // _PAGE) * _PAGE for each in sizes)
    room = attacked.random.randrange(1, max(2, size // _PAGE)) * _PAGE
    disk = attacked.folder / "disk"
    disk.mkdir()
    total = room + (size if attacked.replaces else 0)
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={total}", "tmpfs", str(disk)], check=True)
    try:
        if attacked.replaces:
            attacked.finished.copy_to(disk)
        output = disk / attacked.output.name
        run = attacked.start("struck", output=output)
        code = run.wait()
        what = f"room for {room} of {size} bytes: "
        if code not in (0, 1, 2) or run.processes_left():
            return f"{what}exit code {code}, or a process is left\n{run.said()}"
        if code and "space" not in run.said():
            return f"{what}the error does not say why\n{run.said()}"
        if run.tracebacks():
            return f"{what}a traceback\n{run.said()}"
        if problem := lost(attacked, output):
            return f"{what}{problem}\n{run.said()}"
        subprocess.run([*mount, f"remount,size={total + 8 * size}", str(disk)], check=True)
        problem = succeeds(attacked, "again", output)
        return problem and f"{what}{problem}"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def together(attacked: Round) -> str:
    """Two runs at once with one output: one makes it, the other is refused."""
    first = attacked.start("first")
    time.sleep(attacked.random.random() * 0.6 * attacked.finished.start_up)
    second = attacked.start("second")
    codes = sorted(str(run.wait()) for run in (first, second))
    problem = ""
    if codes != ["0", "2"]:
        problem = f"exit codes {' and '.join(codes)}"
    elif not is_whole(attacked.variety, attacked.output):
        problem = damage(attacked.variety, attacked.output) or "no output"
    elif different := differences(attacked.variety, attacked.finished.output, attacked.output):
        problem = f"the output differs: {', '.join(different)}"
    return problem and f"{problem}\n{first.said()}\n{second.said()}"


ATTACKS: dict[str, Callable[[Round], str]] = {
    "kills": kills, "interrupts": interrupts, "flips": flips, "disks": disks, "together": together
}  # fmt: skip


@dataclass
class Campaign:
    """All rounds of all attacks on all stages, ``jobs`` at a time."""

    work: Path
    attacks: list[str]
    varieties: list[Variety]
    rounds: range
    jobs: int
    minutes: float

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.work / "inputs")
        self.end = time.monotonic() + self.minutes * 60
        self.lock = threading.Lock()
        self.tried: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()

    def run(self) -> None:
        self.inputs.make()
        shutil.rmtree(self.work / "finished", ignore_errors=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            made = [
                Finished(each, self.inputs, self.work / "finished" / each.name)
                for each in self.varieties
            ]
            finished = {each.variety: each for each in pool.map(Finished.make, made)}
            planned = [
                pool.submit(self.one, attack, finished[variety], number)
                for number, attack, variety in itertools.product(
                    self.rounds, self.attacks, self.varieties
                )
                if attack != "flips" or variety.stage in READERS
            ]
            for each in tqdm(as_completed(planned), total=len(planned), unit="round"):
                each.result()

    def one(self, attack: str, finished: Finished, number: int) -> None:
        if time.monotonic() > self.end:
            return
        began, name = time.monotonic(), finished.variety.name
        folder = self.work / "rounds" / f"{attack}-{name}-{number}"
        attacked = Round(attack, finished.variety, number, finished, folder)
        try:
            problem = ATTACKS[attack](attacked)
        except Exception as error:  # a damaged manifest, say: the other rounds go on
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            shutil.rmtree(folder)
        row = {"attack": attack, "stage": name, "round": number, "problem": problem}
        row["seconds"] = round(time.monotonic() - began, 1)
        with self.lock:
            self.tried[attack, name] += 1
            self.failed[attack, name] += bool(problem)
            if problem:
                tqdm.write(f"{attack}, {name}, round {number}: {problem}")
            with (self.work / "results.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    def table(self) -> Table:
        table = Table("stage", *self.attacks, title="reliability: failures / rounds")
        for each in self.varieties:
            cells = ((attack, each.name) for attack in self.attacks)
            counts = [f"{self.failed[c]} / {self.tried[c]}" if self.tried[c] else "" for c in cells]
            table.add_row(each.name, *counts)
        return table


def _words(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(allowed) if text == "all" else text.split(",")
        if wrong := [name for name in names if name.partition("@")[0] not in allowed]:
            raise argparse.ArgumentTypeError(f"{wrong[0]}: one of {', '.join(allowed)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("attacks", type=_words(ATTACKS), help=f"{','.join(ATTACKS)}, or all")
    parser.add_argument("--stages", type=_words(STAGES), default=list(STAGES), help="(all)")
    parser.add_argument("--rounds", type=int, default=10, help="per stage (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (0)")
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="no round begins later (no limit)"
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/reliability"), help="(%(default)s)")
    args = parser.parse_args()
    varieties = [Variety(name) for name in args.stages]
    work = args.work.absolute()
    rounds = range(args.first, args.first + args.rounds)
    campaign = Campaign(work, args.attacks, varieties, rounds, args.jobs, args.minutes)
    campaign.run()
    Console().print(campaign.table())
    sys.exit(1 if campaign.failed.total() else 0)


if __name__ == "__main__":
    main()
