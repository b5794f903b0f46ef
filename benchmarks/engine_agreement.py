"""Compare an engine's greedy tokens with ours, prompt by prompt.

    python benchmarks/engine_agreement.py OURS.json ENGINE.json --end-token 2

OURS.json is written by greedy_tokens.py; ENGINE.json has ``outputs`` with ``prompt_token_ids`` and
``token_ids``. With --end-token, tokens are compared up to the first of it: an engine that was told
to ignore the end continues into turns that nobody asked for. Exit code 1 if fewer than 95 % of the
prompts have the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

NEEDED = 0.95


def first_difference(mine: list[int], theirs: list[int]) -> int | None:
    """Index of the first token that differs or is missing in one; None for the same tokens."""
    for index, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            return index
    return None if len(mine) == len(theirs) else min(len(mine), len(theirs))


def until(tokens: list[int], end: int | None) -> list[int]:
    """The tokens up to the first ``end``, that one included."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def margin(mine: dict[str, Any], index: int) -> str:
    """How near to a tie the token was here, if the file says so."""
    known = mine.get("margins", [])[index : index + 1]
    return f", the best two logits {known[0]} apart here" if known else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--end-token", type=int)
    args = parser.parse_args()
    ours = json.loads(args.ours.read_text(encoding="utf-8"))
    engine = json.loads(args.engine.read_text(encoding="utf-8"))["outputs"]
    same = 0
    for number, (mine, theirs) in enumerate(zip(ours, engine, strict=True)):
        if mine["prompt_token_ids"] != theirs["prompt_token_ids"]:
            print(f"prompt {number}: the prompt itself has other tokens")
            continue
        mine_ids = until(mine["token_ids"], args.end_token)
        their_ids = until(theirs["token_ids"], args.end_token)
        index = first_difference(mine_ids, their_ids)
        if index is None:
            same += 1
        else:
            print(
                f"prompt {number}: token {index}: here {mine_ids[index : index + 1]}, "
                f"in the engine {their_ids[index : index + 1]}{margin(mine, index)}"
            )
    print(f"{same} of {len(ours)} prompts have the same greedy tokens")
    if same < NEEDED * len(ours):
        sys.exit(1)


if __name__ == "__main__":
    main()
