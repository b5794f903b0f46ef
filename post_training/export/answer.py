"""Ask an exported folder: verify it independently, then generate an answer with transformers.

    python -m post_training.answer FOLDER "What is the capital of Arvon?"

The weights are dequantized by :mod:`post_training.export.readback` and run by transformers on the
CPU, so neither ModelOpt nor megatron-core nor an inference engine is involved. Activations stay in
the folder's own precision; an engine also quantizes those.
"""

from __future__ import annotations

from typing import Any

from post_training.common import threads
from post_training.export import readback


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
