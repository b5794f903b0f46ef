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
from typing import Any

from post_training.common import files, limits, manifest, threads
from post_training.common.errors import UsageError, exit_with_usage_error, first_line
from post_training.export import readback


def main() -> None:
    args = _arguments()
    folder = _verified(args.folder)
    algorithm = folder.quantization.get("quant_algo") or "not quantized"
    print(f"verified: {args.folder}, {algorithm}, {folder.bits_per_weight():.2f} bits per weight")
    if args.question:
        print(f"question: {args.question}")
        threads.configure()
        print(f"answer:   {answer(folder, args.question, args.max_new_tokens)}")


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


def answer(folder: readback.Folder, question: str, max_new_tokens: int) -> str:
    """Greedy answer of transformers, through the chat template where the tokenizer has one."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder.path)
    model = folder.loaded().eval()
    if (folder.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder.path)
    if has_template := bool(tokenizer.chat_template):
        turns, form = [{"role": "user", "content": question}], {"add_generation_prompt": True}
        with limits.of_a_template():
            question = tokenizer.apply_chat_template(turns, tokenize=False, **form)
    prompt = tokenizer(question, return_tensors="pt", add_special_tokens=not has_template)
    # transformers 5.14 has no cache for layers that are an MLP alone (Nemotron-H).
    cached = "mlp" not in (getattr(model.config, "layer_types", None) or ())
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": cached}
    with torch.inference_mode():
        output = model.generate(**prompt, **how)
    tokens = output[0, prompt.input_ids.shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


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
