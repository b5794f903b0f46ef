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

from post_training.common import files, manifest, threads
from post_training.common.errors import UsageError, exit_with_usage_error, first_line
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
        recorded = (manifest.read(path) or {}).get("outputs", [])
        problems = [f"{each} is not what run.json says" for each in files.changed(path, recorded)]
        folder, found = _read(path)
    except UsageError as error:
        exit_with_usage_error(error)
    for problem in problems + found:
        print(f"problem: {problem}", file=sys.stderr)
    if problems + found:
        sys.exit(1)
    return folder


def _read(path: Path) -> tuple[readback.Folder, list[str]]:
    """The folder, and what is wrong in it."""
    try:
        folder = readback.Folder(path)
        return folder, folder.problems() or folder.damaged_values()
    except UsageError:
        raise
    # transformers has errors of its own for the values of a configuration that it refuses.
    except Exception as error:
        cause = f"its configuration cannot be read: {first_line(error)}"
        raise UsageError(f"folder {path}", cause, "export it again") from error
