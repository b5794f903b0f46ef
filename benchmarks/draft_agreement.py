"""Compare an engine's speculative decoding with validate's, on the same prompts.

    python benchmarks/draft_agreement.py TRUTH.json             # the prompts, each ended by a NUL
    python benchmarks/draft_agreement.py TRUTH.json ENGINE.json --end-token 2

TRUTH.json is what ``validate.sh --ignore-eos`` saved (SAVE_GT_PATH): prompts, greedy tokens and the
acceptance length. ENGINE.json has ``outputs`` with ``prompt_token_ids`` and ``token_ids``, of an
engine that was told to ignore the end too, with as many draft tokens, and its counts in
``speculation``: ``acceptance_length``, tokens per pass of the target. With --end-token, tokens are
compared up to the first of it, as engine_agreement.py does. Exit code 1 if fewer than
95 % of the prompts have the same tokens, or the acceptance lengths differ by more than 5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine_agreement import until

SAME_TOKENS = 0.95
LENGTH_TOLERANCE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("truth", type=Path)
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("--end-token", type=int)
    args = parser.parse_args()
    truth = json.loads(args.truth.read_text(encoding="utf-8"))
    if args.engine is None:
        for answer in truth["answers"]:
            sys.stdout.write(answer["prompt_text"] + "\0")
        return
    engine = json.loads(args.engine.read_text(encoding="utf-8"))
    theirs = {tuple(row["prompt_token_ids"]): row["token_ids"] for row in engine["outputs"]}
    same = missing = 0
    for answer in truth["answers"]:
        tokens = theirs.get(tuple(answer["prompt"]))
        missing += tokens is None
        if tokens is not None:
            same += until(tokens, args.end_token) == until(answer["tokens"], args.end_token)
    count = len(truth["answers"])
    ours, their_length = (
        each["acceptance_length"] for each in (truth["acceptance"], engine["speculation"])
    )
    difference = their_length / ours - 1
    print(f"{same} of {count} prompts have the same tokens; {missing} are not in {args.engine}")
    print(
        f"acceptance length: {ours:.3f} here, {their_length:.3f} in the engine "
        f"({100 * difference:+.1f} %)"
    )
    if same < SAME_TOKENS * count or abs(difference) > LENGTH_TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
