"""Completions of a real model over HTTP, in the forms of vLLM, SGLang and others.

For ``served.scripted``: no engine runs on the CPU that lists log probabilities, so transformers
computes them here, in float32, one whole forward pass a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from served import Reply


@dataclass
class ServedModel:
    """A model and its tokenizer behind ``/v1/completions`` and SGLang's ``/generate``.

    Attributes:
        most: next tokens that are listed at the most; more are refused as vLLM does.
        echoes: whether the tokens of the prompt have log probabilities.
        positions: most tokens of prompt and answer.
        broken: log probabilities are NaN.
    """

    model: Any
    tokenizer: Any
    most: int = 20
    echoes: bool = True
    positions: int = 4096
    broken: bool = False
    last: tuple[list[int], torch.Tensor] | None = None

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        last = self.last  # another thread may replace it
        if last is not None and last[0] == ids:
            return last[1]
        found = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found = found * float("nan") if self.broken else found
        self.last = (list(ids), found)
        return found

    def post(self, number: int, path: str, body: dict[str, Any]) -> Reply:
        if path == "/generate":
            return Reply(self.native(body))
        prompt = body["prompt"]
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if len(ids) + body["max_tokens"] > self.positions:
            said = f"This model's maximum context length is {self.positions} tokens"
            return Reply({"error": {"message": said}}, 400)
        count = body.get("logprobs")
        if count is not None and count > self.most:
            said = f"Requested logprobs of {count}, which is greater than max allowed: {self.most}"
            return Reply({"error": {"message": said}}, 400)
        if body.get("echo") and count is not None and not self.echoes:
            return Reply({"error": {"message": "Echo is not compatible with logprobs"}}, 400)
        return Reply(self.completion(ids, body, count))

    def completion(self, ids: list[int], body: dict[str, Any], count: int | None) -> dict:
        whole, text, reason = list(ids), "", "length"
        for _ in range(body["max_tokens"]):
            token = int(self.logprobs(whole)[-1].nan_to_num().argmax())
            whole.append(token)
            if token == self.tokenizer.eos_token_id:
                reason = "stop"
                break
            text = self.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
            ends = [text.index(stop) for stop in body.get("stop") or () if stop in text]
            if ends:
                text, reason = text[: min(ends)], "stop"
                break
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
        if count is not None and self.most:
            choice["logprobs"] = self.listed(whole, 0 if body.get("echo") else len(ids), body)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(whole) - len(ids)}
        return {"model": "tiny", "choices": [choice], "usage": usage}

    def listed(self, whole: list[int], first: int, body: dict[str, Any]) -> dict[str, Any]:
        """As OpenAI's legacy API: nothing of the very first token, which follows no other."""
        rows = self.logprobs(whole[:-1])
        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for place in range(first, len(whole)):
            if place == 0:
                own.append(None)
                top.append(None)
                continue
            row = rows[place - 1]
            own.append(float(row[whole[place]]))
            best = row.nan_to_num(-9999).topk(body["logprobs"])
            found = {int(i): float(row[i]) for i in (*best.indices, whole[place])}
            numbered = body.get("return_tokens_as_token_ids")
            top.append({self.name(i, numbered): value for i, value in found.items()})
        return {"token_logprobs": own, "top_logprobs": top, "tokens": []}

    def name(self, token: int, numbered: bool | None) -> str:
        return f"token_id:{token}" if numbered else self.tokenizer.decode([token])

    def native(self, body: dict[str, Any]) -> dict[str, Any]:
        """SGLang's: [log probability, number, text] for each token."""
        ids = body["input_ids"]
        rows = self.logprobs(ids)
        meta: dict[str, Any] = {}
        if wanted := body.get("token_ids_logprob"):
            meta["output_token_ids_logprobs"] = [[[float(rows[-1][i]), i, None] for i in wanted]]
        if body.get("logprob_start_len") == 0:
            given = [float(rows[i - 1][ids[i]]) for i in range(1, len(ids))]
            values = zip([None, *given], ids, strict=True)
            meta["input_token_logprobs"] = [[value, i, None] for value, i in values]
        return {"text": "x", "meta_info": meta}
