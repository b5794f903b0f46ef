"""The model card (README.md) of an exported folder: from manifests, with nothing that none says.

The source's own README.md is about another model: its license and language are stated again, and
nothing else of it. No torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from post_training.checkpoints import huggingface
from post_training.checkpoints.source import Source
from post_training.common import files, inputs, manifest
from post_training.common.errors import UsageError
from post_training.common.manifest import Manifest
from post_training.drafts import report as draft_report
from post_training.drafts.record import SUBFOLDER
from post_training.export import stated
from post_training.export import target as export_target
from post_training.quantization.engines import registry as engines
from post_training.reporting import chain, comparable, measures, records, values
from post_training.reporting.markup import fenced, markdown
from post_training.reporting.measures import Measured, percent, precise
from post_training.reporting.records import Record

_MOST_STAGES = 50  # of a line: a manifest that names itself would have no end
_COMPRESSED = "compressed-tensors"  # which transformers loads too


@dataclass(frozen=True)
class Card:
    """What the card of one export is made from.

    Attributes:
        name: of the folder.
        source: the checkpoint.
        original: the folder with the source's configuration and README.md.
        made: the export's manifest, before its files are described.
        target: the engine, by its name in ``--target``.
    """

    name: str
    source: Source
    original: Path
    made: Manifest
    target: str

    def write(self, folder: Path) -> None:
        """Write README.md into ``folder``, in place of one that came from elsewhere."""
        head = yaml.safe_dump(self.front_matter(folder), sort_keys=False, allow_unicode=True)
        parts = [f"---\n{head}---", f"# {markdown(self.name)}", *self._body()]
        files.write_text(folder / stated.README, "\n\n".join(parts) + "\n")

    @cached_property
    def lineage(self) -> list[Record]:
        """Records of the checkpoint and of what it was made from, the checkpoint's first."""
        found: list[Record] = []
        location = Path(self.source.location)
        expected = values.text(self.source.entry, "manifest_sha256")
        while expected and len(found) < _MOST_STAGES:
            path = location / manifest.FILE
            try:
                content = manifest.read(location)
            except (UsageError, OSError):
                break
            if content is None or Record(path, content).sha256 != expected:
                break  # made again since, or gone
            found.append(Record(path, content))
            before = self._input(found[-1])
            location = Path(values.text(before, "path"))
            expected = values.text(before, "manifest_sha256")
        return found

    @cached_property
    def reports(self) -> list[Record]:
        """What was measured of the checkpoint as it is now, found beside it."""
        sha256 = values.text(self.source.entry, "manifest_sha256")
        if not sha256 or self.quantized_here:
            return []  # what was measured is the model before
        beside = records.collect([Path(self.source.location).resolve().parent], deepest=0)
        return [
            each
            for each in beside.records
            if not each.is_output
            and not comparable.of_weights_alone(each)  # an engine rounds more
            and values.text(self._input(each), "manifest_sha256") == sha256
        ]

    @cached_property
    def origin(self) -> str:
        """The name on the hub, or the folder's, of what the line of stages began with."""
        first = self._input(self.lineage[-1]) if self.lineage else self.source.entry
        return chain.hub_name(values.text(first, "path"))

    @property
    def quantized_here(self) -> bool:
        """Whether the source was quantized by the process that exports it."""
        return "quantization" in self.made.extra

    @property
    def stages(self) -> list[str]:
        """What was done, in order, before it was exported."""
        done = [each.stage for each in reversed(self.lineage)]
        return [*done, "quantize"] if self.quantized_here else done

    @property
    def is_on_hub(self) -> bool:
        return inputs.is_hub_name(self.origin)

    @property
    def is_draft(self) -> bool:
        return "draft_vocab_size" in self.made.metrics

    @property
    def is_simulated(self) -> bool:
        return "fake_quantizers" in self.made.metrics

    @staticmethod
    def _input(record: Record) -> Mapping[str, Any]:
        return next((each for each in record.inputs if each.get("role") == chain.MODEL), {})

    def front_matter(self, folder: Path) -> dict[str, Any]:
        """What the hub reads; a key is left out where nothing is known."""
        config = huggingface.read_config(folder)
        algorithm = self.made.metrics.get("quant_algo")
        stages = self.stages
        found: dict[str, Any] = {}
        if self.is_on_hub:
            found["base_model"] = self.origin
            if algorithm:
                found["base_model_relation"] = "quantized"
            elif not self.is_draft and {"distill", "finetune"} & {*stages}:
                found["base_model_relation"] = "finetune"
        found |= stated.license_and_language(self.original)
        method = values.text(config, "quantization_config", "quant_method")
        is_plain = not algorithm and not self.is_simulated and not self.is_draft
        in_transformers = is_plain or method == _COMPRESSED
        found["library_name"] = "transformers" if in_transformers else "Model Optimizer"
        sees = "text_config" in config and "vision_config" in config
        found["pipeline_tag"] = "image-text-to-text" if sees else "text-generation"
        tags = ["ModelOpt", self.target]
        tags += [str(algorithm), "quantized"] if algorithm else []
        tags += ["pruned"] if "prune" in stages else []
        tags += ["distilled"] if "distill" in stages else []
        has_draft = self.is_draft or "draft" in self.made.metrics
        found["tags"] = [*tags, *(["eagle3", "speculative-decoding"] if has_draft else [])]
        results = [] if self.is_draft else list(self._results())
        if results:
            found["model-index"] = [{"name": self.name, "results": results}]
        return found

    def _results(self) -> Iterator[dict[str, Any]]:
        score = measures.score(self._node)
        if score is not None:
            asked = self._questions(score.record)
            how = measures.asked(score.record)
            yield {
                "task": {"type": "text-generation"},
                "dataset": {"type": asked if inputs.is_hub_name(asked) else "local", "name": asked},
                "metrics": [
                    {
                        "type": "accuracy",
                        "name": ", ".join(["accuracy", *how]),
                        "value": round(score.value, 4),
                    }
                ],
            }

    @cached_property
    def _node(self) -> chain.Node:
        return chain.Node(self.source.location, reports=self.reports)

    @staticmethod
    def _questions(record: Record) -> str:
        """The name on the hub of what was asked, or a folder's."""
        of = (each for each in record.inputs if each.get("role") == "questions")
        name = chain.hub_name(values.text(next(of, {}), "path"))
        return name if inputs.is_hub_name(name) else f"{name} (a local folder)"

    def _body(self) -> Iterator[str]:
        yield self._lead()
        rows = [f"| {markdown(name)} | {markdown(text)} |" for name, text in self._facts()]
        yield "\n".join(["| | |", "|---|---|", *rows])
        yield "## Serving"
        yield fenced(self._serving(), "sh")
        yield "## Verification"
        yield self._verified()
        if measured := list(self._measured()):
            said = (
                "Measured on the checkpoint that this folder was exported from, with the same "
                "weights and scales, computed by Megatron and ModelOpt:"
            )
            yield "\n".join([said, "", *(f"- {markdown(each)}" for each in measured)])
        yield (
            f"`{manifest.FILE}` beside this file has the hash of every file, the versions of all "
            "packages and the command that made them."
        )

    def _lead(self) -> str:
        metrics = self.made.metrics
        origin = f"[{self.origin}](https://huggingface.co/{self.origin})"
        if not self.is_on_hub:
            origin = markdown(self.origin or "a model without a name")
        if self.is_draft:
            return f"A draft (EAGLE-3) for speculative decoding with {origin}."
        kind = metrics.get("quant_algo") or ("with simulated rounding" if self.is_simulated else "")
        made = " and ".join(self._changes()) or "converted"
        text = f"{origin}, {made}{f' ({markdown(kind)})' if kind else ''}"
        return f"{text}, for {engines.TARGETS[self.target].name}."

    def _changes(self) -> list[str]:
        done = {"quantize": "quantized", "prune": "pruned", "distill": "distilled"}
        done |= {"finetune": "fine-tuned"}
        return list(dict.fromkeys(done[each] for each in self.stages if each in done))

    def _facts(self) -> Iterator[tuple[str, str]]:
        metrics = self.made.metrics
        yield "stages", " → ".join([self.origin, *self.stages, "export"])
        if not self.is_draft:
            yield "format", str(metrics.get("quant_algo") or "not quantized")
            yield "KV cache", str(metrics.get("kv_cache_quant_algo") or "not quantized")
            if (bits := values.number(metrics, "bits_per_weight")) is not None:
                yield "bits per weight", f"{bits:.2f}, scales included"
        quantizing = [each.metrics for each in self.lineage if each.stage == "quantize"]
        for of_stage in [self.made.metrics] if self.quantized_here else quantizing:
            calibration = values.mapping(of_stage, "calibration")
            counts = [values.number(calibration, each) for each in ("sequences", "tokens")]
            if counts[0] and counts[1]:
                used = f"{counts[0]:,.0f} sequences, {counts[1]:,.0f} tokens"
                named = chain.hub_name(values.text(calibration, "source"))
                yield "calibrated on", f"{used} of {named}"
        draft = metrics if self.is_draft else values.mapping(metrics, "draft")
        if (size := values.number(draft, "draft_vocab_size")) is not None:
            yield "draft", f"EAGLE-3, {size:,.0f} tokens"

    def _serving(self) -> str:
        folder = Path(self.name)
        if self.is_draft:
            model = "<the model that the draft is for>"
            options = draft_report.served(folder, self.target)
        else:
            model = shlex.quote(self.name)
            has_draft = "draft" in self.made.metrics
            options = draft_report.served(folder / SUBFOLDER, self.target) if has_draft else ""
        return f"{export_target.server(self.target, simulated=self.is_simulated)} {model}{options}"

    def _verified(self) -> str:
        count = values.number(self.made.metrics, "tensors_compared") or 0
        whose = "draft's" if self.is_draft else "model's"
        rounded = self.made.metrics.get("quant_algo") or self.is_simulated
        said = ", rounded as the format says" if rounded else ""
        return (
            "Before this folder got its name, its files were read back by code that shares nothing "
            f"with the exporter: {count:,.0f} tensors equal the {whose}{said}."
        )

    def _measured(self) -> Iterator[str]:
        node = self._node
        if (score := measures.score(node)) is not None and not self.is_draft:
            how = ", ".join([self._questions(score.record), *measures.asked(score.record)])
            yield f"accuracy on {how}: {score.shown(percent, ' %')}"
        others: tuple[tuple[str, Measured | None], ...] = (
            ("perplexity", measures.perplexity(node)),
            ("KL divergence of the next token from the reference's, nats",
             measures.kl_divergence(node)),
        )  # fmt: skip
        for name, found in others if not self.is_draft else ():
            if found is not None:
                yield f"{name}: {found.shown(precise)}"
        if (accepted := measures.acceptance(node)) is not None:
            shown = accepted.shown(lambda value: f"{value:.2f}")
            yield f"acceptance length of the draft: {shown}"
