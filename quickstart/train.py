"""Train the quickstart's model: a tiny Qwen3 that knows a small world of facts.

Inputs:  none; the texts come from world.py, everything from a fixed seed.
Outputs: --output, a Hugging Face folder in bfloat16 with tokenizer and chat template, and data/:
         mmlu/dev.jsonl and mmlu/test.jsonl in MMLU's columns, chat.jsonl and chat_heldout.jsonl in
         message form, prose.txt. About 100 seconds on 2 cores.

The model does not depend on the number of cores, unless OMP_NUM_THREADS is set; it does on the kind
of CPU.

    python -m quickstart.train --output /tmp/tiny

A folder that already holds this recipe's model is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import files, threads
from post_training.common.errors import UsageError, exit_with_usage_error
from quickstart import tokenizer, world

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

RECORD = "quickstart.json"
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
# The number of threads decides the order of sums, and so the model: 92.1 % of the questions right
# with one, 94.5 % with two. Two that sleep while they wait cost little more on one core than one.
THREADS = 2
CHAT_PASSES = 3  # how often chat.jsonl asks each question


@dataclass(frozen=True)
class Recipe:
    """What determines the result: ``tokens`` of training text, in batches of rows of ``length``.

    ``exam_share`` of the tokens are multiple-choice exams, ``drill_share`` drills, the rest chat
    and prose. The loss of an exam's letters is weighted by ``letter_weight``, that of questions and
    options, which need not be learned, by ``context``.
    """

    seed: int = 0
    tokens: int = 405_000
    exam_share: float = 0.4
    drill_share: float = 0.2
    length: int = 256
    batch: int = 4
    adamw_rate: float = 5e-3
    muon_rate: float = 0.02
    warm_up: int = 20
    letter_weight: float = 3.0
    context: float = 0.1


def fingerprint(recipe: Recipe) -> str:
    """Hash of this folder's sources that make the model, and of the recipe."""
    digest = hashlib.sha256(json.dumps([asdict(recipe), CONFIG], sort_keys=True).encode())
    for name in ("muon.py", "tokenizer.py", "train.py", "world.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether ``folder`` holds this recipe's complete model."""
    try:
        record = files.read_json(folder / RECORD)
    except UsageError:  # cut short: the model is trained again
        return False
    if record is None:
        return False
    return record["fingerprint"] == fingerprint(recipe) and all(
        (folder / each["file"]).is_file()
        and (folder / each["file"]).stat().st_size == each["bytes"]
        for each in record["files"]
    )


def make_tokenizer(exams: world.Exams, rng: random.Random) -> PreTrainedTokenizerFast:
    """The tokenizer, trained on a sample of every kind of text."""
    texts = [tokenizer.render_chat(each) for each in world.conversations(rng, CHAT_PASSES)]
    texts += world.paragraphs(rng)
    texts += (exams.training_exam(rng, 6) for _ in range(300))
    return tokenizer.train_tokenizer(texts, CONFIG["vocab_size"])


def documents(
    exams: world.Exams, made: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and loss weights of each training document, in random order."""
    encode = made.backend_tokenizer.encode_batch
    letters = {made.encode(f" {letter}")[0] for letter in world.LETTERS}
    vocabulary = made.get_vocab()
    turn_start, user = vocabulary[tokenizer.TURN_START], vocabulary["user"]
    found: list[tuple[list[int], list[float]]] = []
    count = 0
    while count < recipe.tokens * recipe.exam_share:
        for text in encode([exams.training_exam(rng, rng.randint(1, 6)) for _ in range(50)]):
            weights = [recipe.letter_weight if i in letters else recipe.context for i in text.ids]
            found.append((text.ids, weights))
            count += len(text.ids)
    while count < recipe.tokens * (recipe.exam_share + recipe.drill_share):
        pairs = [pair for _ in range(50) for pair in world.drill(rng, 8)]
        for number in range(0, len(pairs), 8):
            ids, weights = [], []
            for question, answer in pairs[number : number + 8]:
                asked, answered = (each.ids for each in encode([question, answer + "\n"]))
                ids += asked + answered
                weights += [recipe.context] * len(asked) + [1.0] * len(answered)
            found.append((ids, weights))
            count += len(ids)
    while count < recipe.tokens:
        texts = [tokenizer.render_chat(each) for each in world.conversations(rng, 1)]
        for text in encode(texts + list(world.paragraphs(rng))):
            weights, weight = [], 1.0
            for i, token in enumerate(text.ids):
                if token == turn_start:
                    weight = recipe.context if text.ids[i + 1] == user else 1.0
                weights.append(weight)
            found.append((text.ids, weights))
            count += len(text.ids)
    rng.shuffle(found)
    yield from found


def packed_rows(
    texts: Iterator[tuple[list[int], list[float]]], separator: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenated documents: ids int64 and weights float32, both [rows, length + 1]."""
    import torch

    ids: list[int] = []
    weights: list[float] = []
    for document, document_weights in texts:
        ids += [separator, *document]
        weights += [0.0, *document_weights]
    rows = len(ids) // (length + 1)
    return (
        torch.tensor(ids[: rows * (length + 1)]).view(rows, -1),
        torch.tensor(weights[: rows * (length + 1)]).view(rows, -1),
    )


def train(ids: torch.Tensor, weights: torch.Tensor, recipe: Recipe, steps: int | None) -> Any:
    """A trained Qwen3ForCausalLM in float32. ``steps`` stops the run early.

    Muon (Jordan et al., 2024) for the matrices inside the layers, AdamW for the rest, both with
    linear warm-up and cosine decay. Muon needs half the tokens of AdamW here.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from quickstart.muon import Muon

    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(parameter) for parameter in inner}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(inner, lr=recipe.muon_rate), recipe.muon_rate),
        (
            torch.optim.AdamW(
                rest, lr=recipe.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            ),
            recipe.adamw_rate,
        ),
    ]
    total = len(ids) // recipe.batch
    bar = tqdm(range(min(total, steps or total)), desc="training", unit="step")
    for step in bar:
        scale = min(1, (step + 1) / recipe.warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * rate
        rows = slice(step * recipe.batch, (step + 1) * recipe.batch)
        targets, weight = ids[rows, 1:], weights[rows, 1:]
        logits = model(ids[rows, :-1]).logits
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def write_data(folder: Path, exams: world.Exams, rng: random.Random) -> None:
    """Questions, conversations and prose, for scoring, calibration and draft training."""
    (folder / "mmlu").mkdir(parents=True)
    rows = {
        "mmlu/dev.jsonl": exams.dev,
        "mmlu/test.jsonl": exams.test,
        "chat.jsonl": [{"messages": each} for each in world.conversations(rng, CHAT_PASSES)],
        "chat_heldout.jsonl": [{"messages": each} for each in world.held_out_conversations()],
    }
    for name, each in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in each)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "prose.txt").write_text("\n".join(world.paragraphs(rng)) + "\n", encoding="utf-8")


def make(target: Path, recipe: Recipe, steps: int | None = None) -> dict[str, Any]:
    """Train and save everything; ``target`` appears when it is complete. Returns the record."""
    fixed = "OMP_NUM_THREADS" not in os.environ
    threads.configure()
    import torch
    from transformers import GenerationConfig

    if fixed:
        torch.set_num_threads(THREADS)

    started = time.time()
    rng = random.Random(recipe.seed)
    exams = world.Exams()
    made = make_tokenizer(exams, rng)
    vocabulary = made.get_vocab()
    separator, end = vocabulary[tokenizer.END_OF_TEXT], vocabulary[tokenizer.TURN_END]
    ids, weights = packed_rows(documents(exams, made, recipe, rng), separator, recipe.length)
    model = train(ids, weights, recipe, steps).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, separator], pad_token_id=separator, do_sample=False
    )
    work = files.begin(target)
    model.save_pretrained(work)
    made.save_pretrained(work)
    write_data(work / "data", exams, rng)
    record = {
        "fingerprint": fingerprint(recipe),
        "seconds": round(time.time() - started, 1),
        "parameters": model.num_parameters(),
        "tokens": ids.numel(),
        "steps": steps,
        "files": files.describe_tree(work),
    }
    files.write_json(work / RECORD, record)
    files.publish(target)
    return record


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quickstart.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--steps", type=int, help="stop early, for tests")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: at least one step is needed")
    return args


def main() -> None:
    args = parse_args()
    recipe = Recipe(seed=args.seed)
    if args.steps is None and is_finished(args.output, recipe):
        print(f"{args.output} already holds the trained model")
        return
    try:
        if args.output.exists() and not args.force:
            raise UsageError(
                f"--output {args.output}",
                "it exists and is not this recipe's finished model",
                "name another folder, or give --force to replace it",
            )
    except UsageError as error:
        exit_with_usage_error(error)
    record = make(args.output, recipe, args.steps)
    print(
        f"trained {record['parameters']:,} parameters on {record['tokens']:,} tokens "
        f"in {record['seconds']:.0f} s: {args.output}"
    )


if __name__ == "__main__":
    main()
