"""What travels with a checkpoint: configuration and tokenizer, no weights."""

from __future__ import annotations

import json

from model_folders import CONFIG, write_model

from post_training.checkpoints.huggingface import SmallFiles


def test_configuration_and_tokenizer_travel_and_weights_do_not(tmp_path):
    source = write_model(tmp_path / "m")
    tokenizers = {"tokenizer.json", "spiece.model", "tekken.json", "tiktoken.model"}
    for name in tokenizers:
        (source / name).write_text("{}")
    (source / "modeling.py").write_text("")
    for python_files in (False, True):
        target = tmp_path / str(python_files)
        target.mkdir()
        SmallFiles(source, python_files).copy_to(target)
        names = {"config.json"} | tokenizers | ({"modeling.py"} if python_files else set())
        assert {path.name for path in target.iterdir()} == names
        assert json.loads((target / "config.json").read_text()) == CONFIG


def test_a_pruned_models_configuration_takes_the_place_of_the_originals(tmp_path):
    source = write_model(tmp_path / "m")
    (tmp_path / "t").mkdir()
    SmallFiles(source, config={**CONFIG, "num_hidden_layers": 4}).copy_to(tmp_path / "t")
    assert json.loads((tmp_path / "t" / "config.json").read_text())["num_hidden_layers"] == 4
