"""Compare an engine's greedy tokens with ours, prompt by prompt.

    python benchmarks/engine_agreement.py OURS.json ENGINE.json

OURS.json is written by greedy_tokens.py; ENGINE.json has ``outputs`` with ``prompt_token_ids`` and
``token_ids``. Exit code 1 if fewer than 95 % of the prompts have the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

NEEDED = 0.95


def first_difference(mine: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs; None for the same tokens."""
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            return index
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("engine", type=Path)
    args = parser.parse_args()
    ours = json.loads(args.ours.read_text(encoding="utf-8"))
    engine = json.loads(args.engine.read_text(encoding="utf-8"))["outputs"]
    same = 0
    for number, (mine, theirs) in enumerate(zip(ours, engine, strict=True)):
        if mine["prompt_token_ids"] != theirs["prompt_token_ids"]:
            print(f"prompt {number}: the prompt itself has other tokens")
            continue
        length = min(len(mine["token_ids"]), len(theirs["token_ids"]))
        index = first_difference(mine["token_ids"][:length], theirs["token_ids"][:length])
        if index is None:
            same += 1
        else:
            print(
                f"prompt {number}: token {index} is {mine['token_ids'][index]} here and "
                f"{theirs['token_ids'][index]} in the engine"
            )
    print(f"{same} of {len(ours)} prompts have the same greedy tokens")
    if same < NEEDED * len(ours):
        sys.exit(1)


if __name__ == "__main__":
    main()
