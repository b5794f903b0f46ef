"""What each format costs: bits, size, perplexity, KL divergence from BF16, a score, and time.

    python benchmarks/formats.py --work /tmp/formats --train-text a.txt b.txt --test-text c.txt
    python benchmarks/formats.py --work /tmp/experts --experts --train-text a.txt --test-text c.txt
    python benchmarks/formats.py --work /tmp/formats --model FOLDER --calibration chat.jsonl \
        --test-text chat_heldout.jsonl

Without --model a small Llama, with --experts a small Qwen3-MoE, is trained on the training text
first (WORK/model; kept, and used again). Each format is quantized and exported, verified as every
export is, and its checkpoint compared with the BF16 model on the test text:

- perplexity, and mean KL divergence from the BF16 model, over all tokens;
- how often both find the same token the most probable one;
- a score: of four continuations the text's own one has the highest probability. Questions are made
  of the test text, the other continuations come from other places of it; 95 % Wilson interval.

Prints a Markdown table, a row as soon as its format is done, and keeps WORK/results.json. Exit code
1 if SmoothQuant is not nearer to BF16 than plain INT8, or AWQ or GPTQ than rounding to nearest.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from post_training.cli.stage import Stage, make_plan, open_session
from post_training.config import arguments
from post_training.config.options import StageOptions

if TYPE_CHECKING:
    import torch

    from post_training.distributed.session import Session

WINDOW = 512  # tokens of a text, which is looked at in pieces
CONTINUATION = 24  # tokens
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
# What a row is called -> flags of quantize.
FORMATS: dict[str, tuple[str, ...]] = {
    name: ("--export-quant-cfg", name)
    for name in (
        "FP8_DEFAULT_CFG",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
        "MXFP8_DEFAULT_CFG",
        "INT8_DEFAULT_CFG",
        "INT8_SMOOTHQUANT_CFG",
        "INT8_PER_CHANNEL_PER_TOKEN_CFG",
        "INT8_SMOOTHQUANT_PER_TOKEN_CFG",
        "INT8_WEIGHT_ONLY_CFG",
        "INT8_GPTQ_CFG",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT4_AWQ_CFG",
        "INT4_AWQ_CLIP_CFG",
        "INT4_AWQ_FULL_CFG",
        "INT4_GPTQ_CFG",
        "W4A8_FP8_AWQ_CFG",
        "MXFP4_DEFAULT_CFG",
        "NVFP4_DEFAULT_CFG",
        "NVFP4_AWQ_LITE_CFG",
        "W4A16_NVFP4_CFG",
    )
}
FORMATS["FP8_DEFAULT_CFG, KV cache FP8"] = (
    *("--export-quant-cfg", "FP8_DEFAULT_CFG"),
    *("--export-kv-cache-quant", "fp8"),
)
FORMATS["NVFP4_DEFAULT_CFG, KV cache FP8"] = (
    *("--export-quant-cfg", "NVFP4_DEFAULT_CFG"),
    *("--export-kv-cache-quant", "fp8"),
)
# Of a model with experts: which of them each calibration token reaches.
MOE_FORMATS = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_GPTQ_CFG", "INT4_GPTQ_CFG")
for _name in MOE_FORMATS:
    for _share in ("0.5", "all"):
        FORMATS[f"{_name}, experts {_share}"] = (*FORMATS[_name], "--moe-calibrate", _share)
EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}
# The first may not be farther from BF16 than the second, but for noise.
ORDER = (
    ("INT8_SMOOTHQUANT_CFG", "INT8_DEFAULT_CFG"),
    ("INT8_SMOOTHQUANT_PER_TOKEN_CFG", "INT8_PER_CHANNEL_PER_TOKEN_CFG"),
    ("INT8_GPTQ_CFG", "INT8_WEIGHT_ONLY_CFG"),
    ("INT4_AWQ_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ("INT4_AWQ_CLIP_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ("INT4_AWQ_FULL_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ("INT4_GPTQ_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ("NVFP4_AWQ_LITE_CFG", "NVFP4_DEFAULT_CFG"),
)
COLUMNS = (
    *("format", "exported as", "bits", "MB", "perplexity", "KL, 1e-3", "same first token"),
    *("score", "95 % interval", "quantize s", "export s"),
)

Figures = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What models are compared on: windows of tokens, and questions.

    A question is (tokens before, four continuations, index of the text's own).
    """

    windows: list[list[int]]
    questions: list[tuple[list[int], list[list[int]], int]]

    @classmethod
    def of(cls, file: str, tokenizer: Any, windows: int, questions: int) -> Material:
        rows = token_rows(file, tokenizer)
        if len(rows) == 1:
            rows = [rows[0][i : i + WINDOW] for i in range(0, len(rows[0]) - WINDOW, WINDOW)]
        choice = random.Random(0)
        choice.shuffle(rows)
        rows = [row[:WINDOW] for row in rows if len(row) > 2 * CONTINUATION]
        made = []
        for _ in range(questions):
            parts = []
            for row in choice.sample(rows, 4):
                start = choice.randrange(CONTINUATION, len(row) - CONTINUATION + 1)
                parts.append((row[max(0, start - 128) : start], row[start : start + CONTINUATION]))
            own = choice.randrange(4)
            made.append((parts[own][0], [each for _, each in parts], own))
        return cls(rows[:windows], made)


def token_rows(file: str, tokenizer: Any) -> list[list[int]]:
    """The tokens of each conversation, or of all texts in one row."""
    from post_training.data import sources

    rows: list[list[int]] = [[]]
    for document in sources.read_documents(file):
        if document.messages:
            text = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
            rows.append(tokenizer(text).input_ids)
        else:
            rows[0] += tokenizer(document.text + "\n").input_ids
    return rows if rows[0] else rows[1:]


def train(folder: Path, files: list[str], steps: int, experts: bool) -> None:
    """Train a tokenizer and a small model on the text of ``files``, and save both."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tqdm import trange
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )

    from post_training.data import sources

    texts = [document.text for file in files for document in sources.read_documents(file)]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(
        texts, vocab_size=SHAPE["vocab_size"], special_tokens=["<|end|>"], show_progress=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([i for text in texts for i in tokenizer(text + "\n").input_ids])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    kind = {"model_type": "qwen3_moe", **EXPERTS} if experts else {"model_type": "llama"}
    config = AutoConfig.for_model(**kind, **SHAPE, bos_token_id=None, eos_token_id=0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    progress = trange(steps, desc="training", unit=" steps")
    for _ in progress:
        starts = torch.randint(len(ids) - 256, (8,)).tolist()
        rows = torch.stack([ids[start : start + 256] for start in starts]).to(device)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)


class Comparison:
    """A model's predictions beside those of the BF16 model."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.reference: list[torch.Tensor] = []

    def figures(self, words: list[object], session: Session) -> Figures:
        """Figures of a checkpoint; the first that is asked for is the reference."""
        import torch

        from post_training.checkpoints import loading
        from post_training.checkpoints.source import fetch_source, find_source
        from post_training.inference import forward

        options = arguments.parse("formats", StageOptions, [*map(str, words)])
        source = fetch_source(find_source(options), options)
        core = forward.unwrap(loading.load(source, options, session))

        def log_probabilities(ids: list[int]) -> torch.Tensor:
            with torch.inference_mode():
                output = forward.run(core, torch.tensor([ids], device=session.device), None)
            assert output is not None
            return output[0].float().log_softmax(-1).cpu()

        mine = [log_probabilities(window) for window in self.material.windows]
        self.reference = self.reference or mine
        tokens = sum(len(window) - 1 for window in self.material.windows)
        entropy = divergence = same = 0.0
        for ids, ours, theirs in zip(self.material.windows, mine, self.reference, strict=True):
            following = torch.tensor(ids[1:])
            entropy -= float(ours[:-1].gather(1, following[:, None]).sum(dtype=torch.float64))
            differences = theirs.exp() * (theirs - ours)
            divergence += float(differences[:-1].sum(dtype=torch.float64))
            same += int((ours.argmax(-1) == theirs.argmax(-1))[:-1].sum())
        right = sum(
            self._chosen(log_probabilities, before, continuations) == own
            for before, continuations, own in self.material.questions
        )
        low, high = wilson(right, len(self.material.questions))
        return {
            "perplexity": round(math.exp(entropy / tokens), 3),
            "kl": divergence / tokens,
            "same_first_token": round(same / tokens, 4),
            "score": round(right / len(self.material.questions), 3),
            "interval": [round(low, 3), round(high, 3)],
        }

    @staticmethod
    def _chosen(log_probabilities: Any, before: list[int], continuations: list[list[int]]) -> int:
        import torch

        values = []
        for each in continuations:
            rows = log_probabilities(before + each)[len(before) - 1 : -1]
            values.append(float(rows.gather(1, torch.tensor(each)[:, None]).sum()))
        return values.index(max(values))


def wilson(right: int, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson, 1927)."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count)
    half *= math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


class Benchmark:
    def __init__(self, args: argparse.Namespace, session: Session, comparison: Comparison) -> None:
        self.args, self.session, self.comparison = args, session, comparison
        self.results: dict[str, Figures] = {}

    def reference(self) -> None:
        saved = self._fresh("bf16")
        self._stage("convert", "--pretrained-model-path", self.args.model, "--save", saved)
        exported = self._fresh("bf16_export")
        export = self._stage("export", "--load", saved, "--export-dir", exported)
        self._note("BF16", ["--load", saved], exported, {}, export)

    def quantize(self, name: str) -> None:
        saved, exported = self._fresh("quantized"), self._fresh("exported")
        quantized = self._stage(
            *("quantize", "--pretrained-model-path", self.args.model, "--save", saved),
            *(*FORMATS[name], "--skip-generate"),
            *("--calib-dataset-path-or-name", self.args.calibration),
            *("--calib-size", self.args.samples, "--calib-max-sequence-length", self.args.length),
        )
        export = self._stage("export", "--load", saved, "--export-dir", exported)
        self._note(name, ["--load", saved], exported, quantized, export)

    def _stage(self, name: str, *words: object) -> Figures:
        """Run a stage in this process; returns its manifest, with the seconds of this stage."""
        import importlib

        from post_training.common import files

        stage: Stage[Any, Any, Any] = importlib.import_module(name).STAGE
        started = time.perf_counter()
        stage.work(make_plan(stage, [*map(str, words)]), self.session)
        seconds = round(time.perf_counter() - started, 2)
        output = words[words.index("--export-dir" if name == "export" else "--save") + 1]
        return {**files.read_json_object(Path(str(output)) / "run.json"), "seconds": seconds}

    def _note(
        self, name: str, words: list[object], exported: Path, quantize: Figures, export: Figures
    ) -> None:
        figures: Figures = {
            "exported_as": export["metrics"]["quant_algo"] or "",
            "bits": export["metrics"].get("bits_per_weight"),
            "mb": round(sum(p.stat().st_size for p in exported.glob("*.safetensors")) / 1e6, 2),
            "quantize_s": quantize.get("seconds"),
            "export_s": export["seconds"],
            **self.comparison.figures(words, self.session),
        }
        self.results[name] = figures
        text = json.dumps(self.results, indent=2)
        (self.args.work / "results.json").write_text(text, encoding="utf-8")
        print(row(name, figures), flush=True)

    def _fresh(self, name: str) -> Path:
        folder: Path = self.args.work / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


def row(name: str, figures: Figures) -> str:
    low, high = figures["interval"]
    cells = (
        f"`{name}`",
        figures["exported_as"],
        f"{figures['bits']:.2f}" if figures["bits"] else "16",
        f"{figures['mb']:.2f}",
        f"{figures['perplexity']:.3f}",
        f"{1e3 * figures['kl']:.3f}",
        f"{100 * figures['same_first_token']:.1f} %",
        f"{100 * figures['score']:.1f} %",
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{figures['quantize_s']:.1f}" if figures["quantize_s"] else "",
        f"{figures['export_s']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def out_of_order(results: dict[str, Figures]) -> list[str]:
    return [
        f"{better} is farther from BF16 than {worse}: KL {results[better]['kl']:.3g} against "
        f"{results[worse]['kl']:.3g}"
        for better, worse in ORDER
        if better in results and worse in results and results[better]["kl"] > results[worse]["kl"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: trained here)")
    parser.add_argument("--experts", action="store_true", help="train a model with experts")
    parser.add_argument("--train-text", nargs="+", default=[], help="files to train on")
    parser.add_argument("--test-text", required=True, help="file that the model has not seen")
    parser.add_argument("--calibration", help="file to calibrate on (default: first to train on)")
    parser.add_argument("--steps", type=int, default=2000, help="of training, 2048 tokens each")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS])
    args = parser.parse_args()
    calibrated = [name for name in FORMATS if "experts" in name or name in MOE_FORMATS]
    args.formats = args.formats or (
        calibrated if args.experts else [name for name in FORMATS if "experts" not in name]
    )
    args.work.mkdir(parents=True, exist_ok=True)
    args.calibration = args.calibration or next(iter(args.train_text), None)
    if not args.calibration or not (args.model or args.train_text):
        parser.error("give --model and --calibration, or --train-text")
    if args.model is None:
        args.model = args.work / "model"
        if not (args.model / "config.json").exists():
            train(args.model, args.train_text, args.steps, args.experts)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    material = Material.of(args.test_text, tokenizer, args.windows, args.questions)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}")
    options = arguments.parse("formats", StageOptions, ["--pretrained-model-path", str(args.model)])
    with open_session(options) as session:
        benchmark = Benchmark(args, session, Comparison(material))
        benchmark.reference()
        for name in args.formats:
            benchmark.quantize(name)
    if wrong := out_of_order(benchmark.results):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
