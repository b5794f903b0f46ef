"""Ask an exported folder: verify it independently, then generate an answer with transformers.

    python -m post_training.answer FOLDER "What is the capital of Arvon?"

The weights are dequantized by :mod:`post_training.readback` and run by transformers on the CPU, so
neither ModelOpt nor megatron-core nor an inference engine is involved. Activations stay in the
folder's own precision; an engine also quantizes those.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from post_training import readback
from post_training.common import threads
from post_training.errors import UsageError, exit_with_usage_error


def answer(folder: readback.Folder, question: str, max_new_tokens: int) -> str:
    """Greedy answer to ``question``, through the chat template where the tokenizer has one."""
    threads.configure()
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder.path)
    model: Any = folder.load()
    if (folder.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder.path)
    text = question
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m post_training.answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="exported model folder")
    parser.add_argument("question", nargs="?", help="without it the folder is only verified")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(64)")
    args = parser.parse_args()
    try:
        if not (args.folder / "config.json").is_file():
            raise UsageError(
                f"folder {args.folder}",
                "it has no config.json",
                "name a folder that export.sh wrote",
            )
        folder = readback.Folder(args.folder)
    except UsageError as error:
        exit_with_usage_error(error)
    problems = folder.problems()
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    algorithm = folder.quantization.get("quant_algo") or "not quantized"
    print(f"verified: {args.folder}, {algorithm}, {folder.bits_per_weight():.2f} bits per weight")
    if args.question:
        print(f"question: {args.question}")
        print(f"answer:   {answer(folder, args.question, args.max_new_tokens)}")


if __name__ == "__main__":
    main()
