"""--mlflow: what a run leaves in a real store of MLflow's, and what happens without one."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import tools

from post_training.cli import tracking
from post_training.common import files, manifest
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.config.options import StageOptions
from post_training.training import metrics

SECRET = "http://me:mine@127.0.0.1:9"  # nothing listens there


def options(*words: object) -> StageOptions:
    return arguments.parse("convert", StageOptions, list(map(str, words)))


def client(store: Path):
    """Of the store in a folder, which MLflow 3 reads only where it is told to."""
    mlflow = pytest.importorskip("mlflow")
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return mlflow.MlflowClient(tracking_uri=store.as_uri())


def the_run(store: Path, experiment: str = "post_training"):
    reader = client(store)
    found = reader.get_experiment_by_name(experiment)
    (run,) = reader.search_runs([found.experiment_id])
    return reader, run


def test_a_training_run_is_logged_with_its_curves(tmp_path):
    pytest.importorskip("mlflow")
    tools.random_model(tmp_path / "model", "qwen3")
    tools.write_conversations(tmp_path / "chat.jsonl")
    tools.run(
        "finetune.py",
        *("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "tuned", "--fp32"),
        *("--finetune-data-files", tmp_path / "chat.jsonl", "--seq-length", 64, "--lr", 1e-3),
        *("--train-iters", 3, "--micro-batch-size", 2, "--log-interval", 1),
        *("--mlflow", tmp_path / "store"),
    )
    reader, run = the_run(tmp_path / "store")
    assert run.info.status == "FINISHED"
    assert run.data.params["stage"] == "finetune" and run.data.params["train_iters"] == "3"
    assert "finetune.py" in run.data.tags["command"]
    lines = [each for each in metrics.read(tmp_path / "tuned" / "training") if "loss" in each]
    logged = reader.get_metric_history(run.info.run_id, "train/loss")
    of_steps = {each.step: each.value for each in logged}
    expected = {each["iteration"]: each["loss"] for each in lines if each["kind"] == "train"}
    assert of_steps == expected and len(expected) == 3
    content = manifest.read(tmp_path / "tuned")
    assert run.data.metrics["parameters"] == content["metrics"]["parameters"]
    kept = {each.path for each in reader.list_artifacts(run.info.run_id, "tuned")}
    assert kept == {"tuned/run.json", "tuned/curves.png", "tuned/metrics.jsonl"}
    copy = reader.download_artifacts(run.info.run_id, "tuned/run.json", str(tmp_path))
    assert Path(copy).read_bytes() == (tmp_path / "tuned" / "run.json").read_bytes()


def test_without_the_flag_nothing_is_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "store"))
    with tracking.run(options(), is_main=True):
        pass
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_away_is_an_error_before_the_work():
    pytest.importorskip("mlflow")
    with (
        pytest.raises(UsageError) as refused,
        tracking.run(options("--mlflow", SECRET), is_main=True),
    ):
        pytest.fail("the work has begun")
    assert "--mlflow http://***@127.0.0.1:9" in str(refused.value)
    assert "mine" not in str(refused.value)


def test_a_store_that_goes_away_costs_no_result(tmp_path, caplog):
    pytest.importorskip("mlflow")
    report = tmp_path / "report.json"
    with (
        caplog.at_level(logging.WARNING, "post_training"),
        tracking.run(options("--mlflow", tmp_path / "store"), is_main=True) as tracked,
    ):
        files.write_json(report, {"stage": "mmlu", "accuracy": 0.5})
        tracked.places = [report]
        shutil.rmtree(tmp_path / "store")
    assert "did not take the results" in caplog.text
    assert files.read_json(report)["accuracy"] == 0.5


def test_a_run_that_fails_is_logged_as_such(tmp_path, monkeypatch):
    """With a report of before, which is not its own; where MLflow's variables say."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    files.write_json(tmp_path / "report.json", {"stage": "mmlu", "accuracy": 0.5})
    with (
        pytest.raises(ValueError, match="broken"),
        tracking.run(options("--mlflow", "--seed", 7), is_main=True) as tracked,
    ):
        tracked.places = [tmp_path / "report.json"]
        raise ValueError("broken")
    _, run = the_run(tmp_path / "store", "tests")
    assert (run.info.status, run.data.metrics) == ("FAILED", {})
    assert run.data.params["seed"] == "7"


def test_the_missing_package_and_place_are_named(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI is not set"):
        tracking.check(options("--mlflow"))
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    without = [each for each in sys.path if not (Path(each) / "mlflow").exists()]
    monkeypatch.setattr(sys, "path", without)
    with pytest.raises(UsageError, match="pip install mlflow-skinny"):
        tracking.check(options("--mlflow", "/tmp/store"))
    tracking.check(options())


def test_figures_are_the_numbers_of_a_report():
    report = {
        "stage": "evaluate",
        "text": {"kl": {"mean": 0.5, "max": float("nan")}, "tokens": 7, "cut": False},
        "configuration": {"seed": 1},
        "answers": [1, 2],
    }
    assert dict(tracking.figures(report)) == {"text/kl/mean": 0.5, "text/tokens": 7.0}
