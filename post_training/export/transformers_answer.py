"""What transformers answers with the decoded weights of an exported folder."""

from __future__ import annotations

from typing import Any

import torch

from post_training.common import limits
from post_training.export import stacked_experts
from post_training.export.readback import Folder
from post_training.models.families import registry as families


def answer(folder: Folder, question: str, max_new_tokens: int) -> str:
    """Greedy, through the chat template where the tokenizer has one."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder.path)
    model = _loaded(folder).eval()
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


def _loaded(folder: Folder) -> Any:
    """The model with its dequantized weights, in float32."""
    stacked = families.of(folder.config).stacked
    values = {name: folder.dequantized(name) for name in folder.expected}
    with torch.device("meta"):
        model_class: Any = type(folder.untrained())
    return model_class.from_pretrained(
        None,
        config=folder.plain_config(),
        state_dict=stacked_experts.joined(values, stacked),
        dtype=torch.float32,
    )
