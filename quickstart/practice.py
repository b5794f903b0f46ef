"""Practice exams about the quickstart's world: text for distillation, in MMLU's prompt format.

    python -m quickstart.practice --output practice.jsonl

Each line is an exam of one to six answered questions, none of which is in the test.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from post_training.common import files
from quickstart import world

SEED = 7
EXAMS = 400
MOST_QUESTIONS = 6


def lines(count: int, seed: int = SEED) -> list[str]:
    """JSON lines with a ``text`` each, the same for the same arguments."""
    exams, rng = world.Exams(), random.Random(seed)
    texts = [exams.training_exam(rng, rng.randint(1, MOST_QUESTIONS)) for _ in range(count)]
    return [json.dumps({"text": text}) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quickstart.practice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--exams", type=int, default=EXAMS, help="(%(default)s)")
    args = parser.parse_args()
    files.write_text(args.output, "\n".join(lines(args.exams)) + "\n")


if __name__ == "__main__":
    main()
