"""lm-evaluation-harness on a Megatron model: the answers of its own transformers model.

MMLU and GSM8K are the harness' own task files, with questions of a local file, so that its prompts
are compared with the stage's too, to the character.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tools
import yaml
from questions import FEW_SHOTS, SUBJECTS, write_questions

from post_training.evaluation import gsm8k, mmlu_data, mmlu_prompts

lm_eval = pytest.importorskip("lm_eval")
FOLDER = Path(lm_eval.__file__).parent / "tasks"
LOGPROBS = 2e-3
NEW = 24


def local(questions: Path, **files: str) -> dict[str, object]:
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {k: str(questions / v) for k, v in files.items()}},
    }


def write_tasks(folder: Path, questions: Path) -> list[str]:
    """The harness' task files for local questions; their names."""
    template = yaml.safe_load((FOLDER / "mmlu/default/_default_template_yaml").read_text())
    tasks = {}
    for subject in SUBJECTS:
        own = local(questions, test=f"{subject}.test.jsonl", dev=f"{subject}.dev.jsonl")
        about = "The following are multiple choice questions (with answers) about {}.\n\n"
        described = about.format(subject.replace("_", " "))
        tasks[f"local_{subject}"] = {
            **template,
            **own,
            "description": described,
            "num_fewshot": FEW_SHOTS,
        }
    problems = yaml.safe_load((FOLDER / "gsm8k/gsm8k-cot.yaml").read_text())
    limit = {**problems["generation_kwargs"], "max_gen_toks": NEW}
    own = local(questions, test="problems.jsonl")
    tasks["local_gsm8k"] = {**problems, **own, "generation_kwargs": limit, "tag": None}
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name}))
    return list(tasks)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The report of the stage at TP=2, and the harness' own result of the same model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    work = tmp_path_factory.mktemp("harness")
    model = tools.random_model(work / "model", "qwen3", max_position_embeddings=8192)
    questions = work / "questions"
    questions.mkdir()
    write_questions(questions)
    for split in ("test", "dev"):
        for subject in SUBJECTS:
            lines = (questions / f"{split}.jsonl").read_text().splitlines(keepends=True)
            mine = [line for line in lines if json.loads(line)["subject"] == subject]
            (questions / f"{subject}.{split}.jsonl").write_text("".join(mine))
    rows = [{"question": f"{i} and {i} are?", "answer": f"Add.\n#### {2 * i}"} for i in range(5)]
    (questions / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "tasks").mkdir()
    names = write_tasks(work / "tasks", questions)
    (work / "mmlu").mkdir()
    for split in ("test", "dev"):
        (work / "mmlu" / f"{split}.jsonl").write_bytes((questions / f"{split}.jsonl").read_bytes())
    tools.run(
        "evaluate.py",
        *("--pretrained-model-path", work / "model", "--fp32", "--tasks", ",".join(names)),
        *("--tasks-path", work / "tasks", "--tasks-batch-size", 5),
        *("--mmlu-dataset", work / "mmlu", "--few-shots", FEW_SHOTS, "--mmlu-batch-size", 4),
        *("--gsm8k-dataset", questions / "problems.jsonl", "--gsm8k-max-new-tokens", NEW),
        *("--evaluate-output", work / "report.json", "--tensor-model-parallel-size", 2),
        processes=2,
        HF_HOME=str(work / "cache"),
    )
    tokenizer = tools.chat_tokenizer()
    tokenizer.name_or_path = str(work / "model")
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=8192),
        tasks=names,
        task_manager=TaskManager(include_path=str(work / "tasks")),
        bootstrap_iters=0,
    )
    report = json.loads((work / "report.json").read_text())
    return SimpleNamespace(work=work, report=report, samples=theirs["samples"], theirs=theirs)


def prompts(setting, task: str) -> list[str]:
    """What the harness asked, by question."""
    rows = sorted(setting.samples[task], key=lambda row: row["doc_id"])
    return [row["arguments"][0][0] for row in rows]


def test_mmlus_prompts_are_the_harness_own_to_the_character(setting):
    benchmark = mmlu_data.load(str(setting.work / "mmlu"), FEW_SHOTS)
    for subject in SUBJECTS:
        mine = [
            mmlu_prompts.prompt(each, benchmark.dev[subject]) for each in benchmark.test[subject]
        ]
        assert prompts(setting, f"local_{subject}") == mine


def test_gsm8ks_prompts_are_the_harness_own_to_the_character(setting):
    solved = gsm8k.examples(None, 8)
    problems = gsm8k.load(str(setting.work / "questions" / "problems.jsonl"))
    mine = [gsm8k.prompt(each, solved) for each in problems for _ in range(2)]
    assert prompts(setting, "local_gsm8k") == mine  # once for each filter


def test_choices_have_the_log_probabilities_of_transformers(setting):
    letters = setting.report["measures"]["mmlu"]["model"]["answers"]
    for subject in SUBJECTS:
        rows = sorted(setting.samples[f"local_{subject}"], key=lambda row: row["doc_id"])
        mine = setting.report["measures"][f"local_{subject}.acc"]["model"]
        assert mine["correct"] == sum(row["acc"] for row in rows)
        for answer, row in zip(mine["answers"], rows, strict=True):
            values = [float(value) for value, _ in json.loads(answer)]
            theirs = [float(value) for value, _ in row["filtered_resps"]]
            assert values == pytest.approx(theirs, abs=LOGPROBS)
        scores = [[value for value, _ in json.loads(each)] for each in mine["answers"]]
        best = "".join("ABCD"[each.index(max(each))] for each in scores)
        assert letters[subject] == best


def test_word_problems_get_the_texts_of_transformers(setting):
    measures = setting.report["measures"]
    for name, of_stage in (("strict-match", "strict"), ("flexible-extract", "flexible")):
        rows = [row for row in setting.samples["local_gsm8k"] if row["filter"] == name]
        rows.sort(key=lambda row: row["doc_id"])
        theirs = [row["filtered_resps"][0] for row in rows]
        mine = measures[f"local_gsm8k.exact_match.{name}"]["model"]
        assert [json.loads(each)[0] for each in mine["answers"]] == theirs
        assert measures[f"gsm8k_{of_stage}"]["model"]["answers"] == theirs
        assert mine["correct"] == measures[f"gsm8k_{of_stage}"]["model"]["correct"]
