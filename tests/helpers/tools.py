"""What several test files need: tiny random models, and stages run as users run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import speed
import torch
import warm

from benchmarks.random_model import CHAT_TEMPLATE, byte_tokenizer
from post_training import portable
from post_training.common import files, manifest
from post_training.models.families import registry as families
from post_training.models.families.base import Family

ROOT = Path(__file__).resolve().parents[2]
# Before a test's module imports megatron-core, as every stage does.
portable.install()
# Parallel layouts: processes and flags. The tiny models have six layers, so 4 + 2 is uneven.
LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "TP=1": (1, ()),
    "TP=2": (2, ("--tensor-model-parallel-size", 2)),
    "PP=2": (2, ("--pipeline-model-parallel-size", 2)),
    "PP=2, 4 + 2 layers": (
        2,
        ("--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 4),
    ),
    "TP=2, ETP=1": (
        2,
        ("--tensor-model-parallel-size", 2, "--expert-tensor-parallel-size", 1),
    ),
    "EP=2": (2, ("--expert-model-parallel-size", 2)),
}
# Name -> family. What is registered is tested; those that see images in test_vision.py.
FAMILIES = {each.name: each for each in families.FAMILIES.values() if not each.prefix}
# Rotary scalings that megatron-core's own table does not have, and YaRN: name -> family, changes.
ROTARY: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama3", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama3 of its own": (
        "qwen2.5",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 16.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    # Shorter than the tests' texts.
    "dynamic": (
        "qwen3",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 8.0},
            "max_position_embeddings": 32,
        },
    ),
    # Texts of the tests pass the original length while they are continued.
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + n / 8 for n in range(12)],
                "long_factor": [2.0 + n for n in range(12)],
            },
            "original_max_position_embeddings": 52,
        },
    ),
    "yarn": (
        "mistral",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


# Divided as other families are, which have the same parts and more: tested at one rank alone.
ALIKE = ("granite-moe", "qwen3.5-moe")


def families_at(layout: str) -> list[str]:
    """Names of the families whose models are divided so in tests."""
    return [name for name in _divisible(layout) if layout == "TP=1" or name not in ALIKE]


def _divisible(layout: str) -> list[str]:
    if layout.startswith("EP"):
        return [name for name, family in FAMILIES.items() if "experts" in family.parts]
    # Biases of experts cannot be divided by TP, which those without can.
    whole = [name for name, family in FAMILIES.items() if has_expert_biases(family)]
    if "ETP=1" in layout:
        return whole
    return [name for name in FAMILIES if name not in whole or layout != "TP=2"]


def has_expert_biases(family: Family) -> bool:
    """Whether megatron-core refuses to divide its experts over tensor-parallel ranks."""
    return "experts" in family.parts and bool(family.constants.get("add_bias_linear"))


def random_model(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    **changes: Any,
):
    """Save a tiny random model of ``family`` with a byte-level tokenizer; returns the model.

    ``family`` may be a name of ``ROTARY``.
    Every parameter is random, norms and biases included, so that a tensor in a wrong place shows,
    and so are the biases of routers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _keep_transformers_in_pytorch()
    family, scaled = ROTARY.get(family, (family, {}))
    config = AutoConfig.for_model(**FAMILIES[family].tiny_config(**{**scaled, **changes}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight", "norm_f.weight")):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.5 * scale)
            elif name.endswith("linear_attn.conv1d.weight"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.08 * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # In float32 whatever the weights have, as in published files.
                buffer.data = torch.empty_like(buffer, dtype=torch.float32).normal_(std=0.3)
        _bring_keys_near_queries(model)
    model.eval().save_pretrained(folder)
    if other_names := FAMILIES[family].other_names:
        _with_published_names(folder / "model.safetensors", other_names)
    chat_tokenizer().save_pretrained(folder)
    return model


def _keep_transformers_in_pytorch() -> None:
    """Its models of recurrences ask for kernels when imported; those run on a GPU alone."""
    from transformers.utils import import_utils

    for name in ("is_flash_linear_attention_available", "is_causal_conv1d_available"):
        setattr(import_utils, name, lambda: False)


def _bring_keys_near_queries(model) -> None:
    """In gated delta nets, whose outputs otherwise are sums that cancel out.

    A norm follows, which would show how float32 rounds them.
    """

    def mixed(of_queries: torch.Tensor, of_keys: torch.Tensor) -> None:
        of_keys.mul_(0.6).add_(0.8 * of_queries)

    for name, module in model.named_modules():
        if name.endswith("linear_attn"):
            size, head = module.key_dim, module.head_k_dim
            mixed(module.conv1d.weight[:size], module.conv1d.weight[size : 2 * size])
            if hasattr(module, "in_proj_qkv"):
                rows = module.in_proj_qkv.weight
                mixed(rows[:size], rows[size : 2 * size])
            else:
                rows = module.in_proj_qkvz.weight.unflatten(0, (module.num_k_heads, -1))
                mixed(rows[:, :head], rows[:, head : 2 * head])


def _with_published_names(path: Path, other_names: Mapping[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for published, saved in other_names.items():
        tensors[published] = tensors.pop(saved)
    save_file(tensors, path, {"format": "pt"})


def chat_tokenizer():
    """One token a byte, with a plain chat template."""
    fast = byte_tokenizer()
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_conversations(path: Path, count: int = 60) -> Path:
    """Questions and answers of different lengths, as JSONL with messages."""
    lines = []
    for i in range(count):
        answer = f"It is {2 * i}." + " Sure." * (i % 4)
        turns = [
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def write_texts(path: Path, count: int = 60) -> Path:
    """Short texts, each of its own, as JSONL."""
    texts = [{"text": f"Fact {i}: {i} plus {i} is {2 * i}, and so on."} for i in range(count)]
    path.write_text("".join(json.dumps(each) + "\n" for each in texts))
    return path


def describe_again(folder: Path) -> None:
    """Let a manifest describe the files as they are now, as whoever changed them can."""
    content = manifest.read(folder)
    content["outputs"] = files.describe_tree(folder, skip=frozenset({manifest.FILE}))
    files.write_json(folder / manifest.FILE, manifest.sealed(content))


def tokens(rows: int = 2, length: int = 48) -> torch.Tensor:
    """Token ids [rows, length], the same on every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, length), generator=generator)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without torchrun's variables; one thread a process."""
    distributed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in distributed}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **variables}


def command(script: str, *flags: object, processes: int = 1) -> list[str]:
    """How a script of this repository is started: python for one process, else torchrun."""
    words = [str(ROOT / script), *map(str, flags)]
    if processes == 1:
        return [sys.executable, *words]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, f"--nproc_per_node={processes}", *words]


def run(
    script: str, *flags: object, processes: int = 1, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end and require the exit ``code``; the output is in the failure.

    In a fork of a warm process (warm.py), unless it is a check, which imports nothing slow.
    """
    line = command(script, *flags, processes=processes)
    if (
        warm.is_possible()
        and not variables
        and not {"--check", "--help-all"} & set(map(str, flags))
    ):
        line = warm.command(ROOT / script, *map(str, flags), processes=processes)
    if processes > 1 and torch.cuda.device_count() < processes:
        variables = {"CUDA_VISIBLE_DEVICES": "", **variables}  # on the CPU, as without a GPU
    done = subprocess.run(
        line,
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=speed.scaled(600),
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_stages(
    *jobs: tuple[str, tuple[object, ...]], processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run stages, given as (name, flags), one after the other in one set of processes.

    The flags of the first decide the parallel sizes; the others must not contradict them.
    Returns what they printed.
    """
    listed = [[name, [str(flag) for flag in flags]] for name, flags in jobs]
    return run("tests/helpers/run_stages.py", json.dumps(listed), processes=processes)


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a Hugging Face folder by name."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, shard.get_tensor(name)


def logits_job(work: Path, ids: torch.Tensor, *flags: object) -> tuple[str, tuple[object, ...]]:
    """A job for :func:`run_stages`; :func:`read_logits` of the same folder gets its result."""
    from safetensors.torch import save_file

    work.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids}, work / "ids.safetensors")
    output = ("--ids", work / "ids.safetensors", "--output", work / "logits.safetensors")
    return ("logits", (*flags, *output))


def read_logits(work: Path) -> torch.Tensor:
    """Logits [rows, length, vocabulary] in float32 that a logits job wrote."""
    from safetensors.torch import load_file

    return load_file(work / "logits.safetensors")["logits"]


def read_tokens(work: Path) -> list[list[int]]:
    """The tokens that a logits job with ``--new-tokens`` generated."""
    from safetensors.torch import load_file

    return load_file(work / "logits.safetensors")["tokens"].tolist()


def transformers_tokens(model, ids: torch.Tensor, count: int) -> list[list[int]]:
    """Greedy continuations of ``count`` tokens each."""
    kept = {"eos_token_id": None, "pad_token_id": 0}
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Where a text passes the original length, transformers 5.14 drops the cache, and then
        # computes the last token as if it were alone.
        kept["use_cache"] = False
    with torch.inference_mode():
        model(ids[:, :1])
        new = model.generate(ids, max_new_tokens=count, do_sample=False, **kept)
    return new[:, ids.shape[1] :].tolist()


def transformers_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [rows, length, vocabulary] in float32.

    Dynamic rotary positions of transformers stay those of the longest text, until a short one.
    """
    with torch.inference_mode():
        model(ids[:, :1])
        return model(ids).logits.float()
