"""Save a model of a real one's shape with random weights: sizes and speed as the real one's.

Beside it lie texts (calibration.jsonl) and conversations (conversations.jsonl) of common words.

python benchmarks/random_model.py Qwen3-8B /tmp/qwen3-8b
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "Qwen3-14B": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "tiny": {  # to try a benchmark without a GPU
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
SHARED: dict[str, Any] = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WORDS = "the of and to in is was for on that with as by it from at are this be which".split()


def save(shape: str, folder: Path, layers: int | None = None) -> None:
    """Write the model in bfloat16 with a byte-level tokenizer and calibration text.

    Args:
        layers: fewer or more than the shape has.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"model_type": "qwen3", **SHARED, **SHAPES[shape]}
    if layers:
        values["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**values)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    texts = [
        " ".join(WORDS[(row * 7 + column) % len(WORDS)] for column in range(400))
        for row in range(512)
    ]
    conversations = [
        [{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text}]
        for text in texts
    ]
    _write_lines(folder / "calibration.jsonl", [{"text": text} for text in texts])
    _write_lines(folder / "conversations.jsonl", [{"messages": each} for each in conversations])


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def byte_tokenizer() -> Any:
    """A tokenizer with one token a byte, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers (those of the shape)")
    args = parser.parse_args()
    save(args.shape, args.folder, args.layers)


if __name__ == "__main__":
    main()
