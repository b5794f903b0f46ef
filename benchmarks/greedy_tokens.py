"""Greedy tokens of a checkpoint for prompts that are given as text, as JSON.

    python benchmarks/greedy_tokens.py --load CHECKPOINT --prompts-file P.json --output OUT.json

P.json is a list of strings. The output has ``prompt_token_ids`` and ``token_ids`` for each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source
from post_training.config import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts-file", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=32)


def main() -> None:
    args = arguments.parse_namespace("greedy_tokens", add_arguments, find_source)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        from post_training.inference import generation

        source = fetch_source(find_source(args), args)
        model = loading.load(source, args, session)
        tokenizer = loading.tokenizer(source, args)
        prompts = json.loads(args.prompts_file.read_text(encoding="utf-8"))
        # As an engine does: the text holds the chat template's special tokens already.
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        new = generation.generate(model, ids, args.max_new_tokens)
        if session.is_main:
            rows = [
                {"prompt_token_ids": prompt, "token_ids": tokens}
                for prompt, tokens in zip(ids, new, strict=True)
            ]
            args.output.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
