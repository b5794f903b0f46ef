"""Ask an exported folder: verify it independently, then generate an answer with transformers.

    python -m post_training.answer FOLDER "What is the capital of Arvon?"

The weights are dequantized by :mod:`post_training.export.readback` and run by transformers on the
CPU, so neither ModelOpt nor megatron-core nor an inference engine is involved. Activations stay in
the folder's own precision; an engine also quantizes those.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from post_training.common import threads
from post_training.common.errors import UsageError, exit_with_usage_error
from post_training.export import readback, transformers_answer


def main() -> None:
    args = _arguments()
    folder = _verified(args.folder)
    algorithm = folder.quantization.get("quant_algo") or "not quantized"
    print(f"verified: {args.folder}, {algorithm}, {folder.bits_per_weight():.2f} bits per weight")
    if args.question:
        print(f"question: {args.question}")
        threads.configure()
        said = transformers_answer.answer(folder, args.question, args.max_new_tokens)
        print(f"answer:   {said}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m post_training.answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="exported model folder")
    parser.add_argument("question", nargs="?", help="without it the folder is only verified")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(64)")
    return parser.parse_args()


def _verified(path: Path) -> readback.Folder:
    """The exported folder; exits with code 2 if it is none, with 1 if something is wrong in it."""
    try:
        if not (path / "config.json").is_file():
            raise UsageError(
                f"folder {path}", "it has no config.json", "name a folder that export.sh wrote"
            )
        folder = readback.Folder(path)
    except UsageError as error:
        exit_with_usage_error(error)
    problems = folder.problems()
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    return folder
