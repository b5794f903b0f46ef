"""slurm/pipeline.sh on a real SLURM: every chain to its end, failures in the middle, mistakes."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import slurm_jobs
from slurm_jobs import quantize_flags, submit, variables

cluster, site, model = slurm_jobs.cluster, slurm_jobs.site, slurm_jobs.model
pytestmark = slurm_jobs.MARKS


def settings(model: Path) -> dict[str, dict[str, str]]:
    """The stages' own variables in each chain."""
    score = f"--mmlu-dataset {model}/questions --mmlu-batch-size 8"
    training = (
        f"--finetune-data-files {model}/chat.jsonl --seq-length 64 --train-iters 3 --eval-iters 1"
    )
    sizes = '--prune-export-config {"num_layers":4,"hidden_size":96}'
    return {
        "quantize": {
            "QUANTIZE_ARGS": quantize_flags(model), "QUANTIZE_TP": "2",
            "QUANTIZE_SBATCH": "--nodes=2", "MMLU_ARGS": score,
        },
        "prune": {
            "PRUNE_ARGS": f"{sizes} {quantize_flags(model, 2)}", "DISTILL_ARGS": training,
            "MMLU_ARGS": score,
        },
        "eagle3": {
            "EAGLE3_ARGS": f"{training} --draft-vocab-size 64",
            "VALIDATE_ARGS": f"--prompts-path {model}/chat.jsonl --prompts-limit 4 --osl 4",
        },
    }  # fmt: skip


def test_the_chains_stop_where_a_stage_fails_and_resume_from_there(cluster, site, model, tmp_path):
    """All three side by side."""
    own = settings(model)

    def pipeline(chain: str, *words: str, code: int = 0, **more: str) -> tuple[str, list[str]]:
        """Submit a chain; returns what is printed and the jobs' numbers."""
        work = tmp_path / chain
        work.mkdir(exist_ok=True)
        added = {name: f"{own[chain][name]} {value}" for name, value in more.items()}
        text = submit(
            *("bash", site / "slurm" / "pipeline.sh", *words, chain, "org/name"),
            environment=variables(cluster, model, work, **{**own[chain], **added}),
            cwd=work,
            code=code,
        )  # fmt: skip
        return text, re.findall(r": job (\d+)", text)

    def together(**more: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
        with ThreadPoolExecutor() as pool:
            found = {chain: pool.submit(pipeline, chain, **more.get(chain, {})) for chain in own}
            return {chain: each.result() for chain, each in found.items()}

    # A score below its bar, training that ends too early, a draft that is not good enough.
    started = together(
        quantize={"MMLU_ARGS": "--lower-bound 1"},
        prune={"DISTILL_ARGS": "--exit-interval 2"},
        eagle3={"VALIDATE_ARGS": "--lower-bound 2"},
    )
    reasons = {
        "quantize": (
            "mmlu",
            r"exit code 1 [^$]*error: MMLU accuracy .* below --lower-bound 1.0000",
        ),
        "prune": ("distill", "exit code 75 .* the same command resumes from what was saved"),
        "eagle3": ("validate", r"exit code 1 [^$]*error: acceptance length 1.0 is below 2.0"),
    }
    for chain, (text, jobs) in started.items():
        states = [cluster.wait(job, 240)["JobState"] for job in jobs]
        log = Path(re.search(r"tail -n \+1 -F (\S+)", text)[1]).read_text()
        cancelled = ["CANCELLED"] * (len(jobs) - 3)
        assert states == ["COMPLETED", "COMPLETED", "FAILED", *cancelled], log
        stage, reason = reasons[chain]
        assert re.search(rf"{stage} \(job \d+\): FAILED with {reason}", log), log
        ends = [tmp_path / chain / "org" / f"name_{kind}" for kind in ("export", "draft")]
        assert not any(end.exists() for end in ends)

    # Without that: the first two stages are left as they are, and the chains run to their ends.
    for chain, (text, jobs) in together().items():
        kept = re.findall(r"(\w+): \S+ is still valid", text)
        assert kept == ["convert", chain]
        states = [cluster.wait(job, 240)["JobState"] for job in jobs]
        assert states == ["COMPLETED"] * (3 if chain == "prune" else 2), text

    def manifest(chain: str, output: str) -> dict:
        return json.loads((tmp_path / chain / "org" / output / "run.json").read_text())

    exported = tmp_path / "quantize" / "org" / "name_export"
    assert json.loads((exported / "hf_quant_config.json").read_text())
    made = manifest("quantize", "name_quant")
    assert made["configuration"]["tensor_model_parallel_size"] == 2
    config, names = read_model(tmp_path / "prune" / "org" / "name_export")
    assert (config["num_hidden_layers"], config["hidden_size"]) == (4, 96)
    assert names["model.embed_tokens.weight"] == [512, 96]
    assert manifest("prune", "name_distilled")["metrics"]["iteration"] == 3
    # It went on where it was, and says so: the pruned model is what it was made from.
    inputs = {each["role"]: each["path"] for each in manifest("prune", "name_distilled")["inputs"]}
    assert [Path(inputs[role]).name for role in ("model", "teacher")] == ["name_pruned", "name_mlm"]
    config, names = read_model(tmp_path / "eagle3" / "org" / "name_draft")
    assert (config["draft_vocab_size"], names["lm_head.weight"]) == (64, [64, 128])
    report = json.loads((tmp_path / "eagle3" / "org" / "name-Eagle3.validate.json").read_text())
    assert report["acceptance"]["identical_answers"] == report["acceptance"]["answers"] == 4

    # Nothing is left to do.
    for chain, (text, jobs) in together().items():
        assert (text.count("is still valid"), jobs) == (5 if chain == "prune" else 4, []), text
        assert "nothing to do" in text
    text, jobs = pipeline("quantize", "--dry-run")
    assert jobs == []
    assert text.count("launch line") == 4
    assert "srun --nodes=2 --ntasks=2" in text
    # Training is not dropped, nor gone on with from another model, without a word.
    own["prune"]["PRUNE_ARGS"] = own["prune"]["PRUNE_ARGS"].replace("96", "64")
    text, jobs = pipeline("prune", code=2)
    assert (jobs, "it holds a training run" in text) == ([], True), text


def read_model(folder: Path) -> tuple[dict, dict[str, list[int]]]:
    """A model's configuration and its tensors' shapes; transformers' names where it loads them."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    if "draft_vocab_size" not in config:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return config, {name: list(each.shape) for name, each in model.named_parameters()}
    with safe_open(folder / "model.safetensors", "pt") as content:
        names = list(content.keys())
        return config, {name: list(content.get_slice(name).get_shape()) for name in names}


def test_a_pipeline_with_a_mistake_submits_nothing(cluster, site, model, tmp_path):
    listing = ("squeue", "--noheader", "--states=all", "--format=%i")  # of states, some may change
    before = set(cluster.run(*listing).stdout.split())
    for more, part in [
        ({"EXPORT_ARGS": "--max-shard-sizes 3"}, "--max-shard-size"),
        ({"MMLU_TP": "3"}, "TP=3"),
        ({"MMLU_ARGS": "--mmlu-dataset '/no such/folder'"}, "/no such/folder"),
    ]:
        text = submit(
            *("bash", site / "slurm" / "pipeline.sh", "quantize", "org/name"),
            environment=variables(
                cluster, model, tmp_path, **{"QUANTIZE_ARGS": quantize_flags(model), **more}
            ),
            cwd=tmp_path,
            code=2,
        )
        assert part in text
    assert set(cluster.run(*listing).stdout.split()) == before
