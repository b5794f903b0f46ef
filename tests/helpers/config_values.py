"""Change each value of a tiny model's config.json, and compare the logits with transformers'.

    PYTHONPATH=. python tests/helpers/config_values.py [family or rotary scaling ...]

Every value is replaced by others of its type, or left out; a change is refused, or the logits are
those of transformers. What is neither is printed: a difference, or an error without a remedy. What
transformers itself cannot compute is counted. Exit code 1 if logits differ. Minutes, so no test.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import run_stages
import tools
import torch
import transformers

from post_training.cli.stage import make_plan, open_session
from post_training.common.errors import UsageError
from post_training.config import arguments

# Of no meaning to the logits.
SKIPPED = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "output_attentions"),
    *("output_hidden_states", "return_dict", "id2label", "label2id", "router_aux_loss_coef"),
    *("_name_or_path", "output_router_logits", "router_jitter_noise", "problem_type"),
}
ACTIVATIONS = ["gelu", "silu", "relu2", "gelu_pytorch_tanh", "relu"]
METHODS = ["none", "softmax", "sigmoid", "greedy", "group_limited_greedy", "noaux_tc"]
ABSENT = object()


def others(key: str, value: Any) -> list[Any]:
    """What to put in place of a value."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, max(value - 1, 0), 0, 2 * value, value // 2]
        case float():
            return [2 * value + 0.5, 0.0, value / 3, None]
        case str():
            return ACTIVATIONS if "act" in key else METHODS
        case None:
            return [True, 0.5, 2, 16, "gelu", [0]]
        case list():
            return [[], value[::-1], value[:-1], value[:1] * len(value), value[-1:] * len(value)]
    return [None, {}]


def changed(config: dict[str, Any], whole: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A description of each change, and the configuration with it."""
    for key, value in whole.items():
        if key in SKIPPED:
            continue
        for other in [*others(key, value), ABSENT]:
            found = copy.deepcopy(config)
            found.pop(key, None)
            yield (
                f"{key}: {'absent' if other is ABSENT else json.dumps(other)}",
                found | ({} if other is ABSENT else {key: other}),
            )
        if isinstance(value, dict):
            for what, inner in changed(config.get(key) or {}, value):
                yield f"{key}.{what}", {**copy.deepcopy(config), key: inner}


def verdict(folder: Path, flags: list[str], session: Any, ids: torch.Tensor) -> str:
    """``refused``, ``same``, ``not computed`` (by transformers), or what is wrong."""
    try:
        run_stages.logits(make_plan(run_stages.LOGITS, flags), session)
    except UsageError:
        return "refused"
    except Exception as error:
        return f"WRONG {type(error).__name__}: {error}"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        wanted = tools.transformers_logits(model.eval(), ids)
    except Exception:
        return "not computed"
    found = tools.read_logits(folder / "logits")
    difference = float((wanted - found[..., : wanted.shape[-1]]).abs().max())
    return "same" if difference < 2e-3 else f"WRONG by {difference:.3g}"


def main(names: list[str]) -> int:
    transformers.logging.set_verbosity_error()
    ids, session, wrong = tools.tokens(), None, 0
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="config-values-"))
        tools.random_model(folder, name)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        whole = {**transformers.AutoConfig.from_pretrained(folder).to_dict(), **config}
        job = tools.logits_job(
            folder / "logits", ids, "--pretrained-model-path", folder, "--tokenizer-model", folder
        )
        flags = [*map(str, job[1]), "--fp32"]
        if session is None:
            options = arguments.parse("logits", run_stages.LogitsOptions, flags)
            session = open_session(options).__enter__()  # to the end of the process
        counts: Counter[str] = Counter()
        for what, content in [("as it is", config), *changed(config, whole)]:
            path.write_text(json.dumps(content))
            found = verdict(folder, flags, session, ids)
            counts[found.split()[0]] += 1
            if found.startswith("WRONG"):
                print(f"{name}: {what}: {found:.200}", flush=True)
        print(name, dict(counts), flush=True)
        wrong += counts["WRONG"]
    return int(wrong > 0)


if __name__ == "__main__":
    code = main(sys.argv[1:] or [*tools.FAMILIES, *tools.ROTARY])
    sys.stdout.flush()
    os._exit(code)
