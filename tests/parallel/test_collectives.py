"""A failure of one rank is every rank's: nobody is left waiting. Two ranks, CPU."""

from __future__ import annotations

import json

import pytest
import tools

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from post_training.checkpoints import huggingface
from post_training.common.errors import UsageError
from post_training.distributed import collectives

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

def refusal(reason):
    return UsageError("the block", reason, "none")

def fails_on_the_second():
    with collectives.fail_together((ValueError,), refusal):
        if rank == 1:
            raise ValueError("rank 1's reason")

def fails_on_none():
    with collectives.fail_together((ValueError,), refusal):
        pass

def outcome(work):
    try:
        work()
    except UsageError as error:
        return f"{error.what}: {error.cause}"
    return ""

found = {
    "second": outcome(fails_on_the_second),
    "none": outcome(fails_on_none),
    "hub": outcome(lambda: huggingface.resolve("nobody/nothing", weights=False)),
    "gathered": collectives.from_all_ranks(rank),
}
torch.distributed.barrier()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()  # its threads abort a process that ends with them
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of two ranks saw; the hub cannot be reached, and nothing is cached."""
    folder = tmp_path_factory.mktemp("collectives")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    cache = str(folder / "cache")
    tools.run(str(program), folder, processes=2, HF_HUB_OFFLINE="1", HF_HUB_CACHE=cache)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_failure_of_one_rank_is_raised_on_all(ranks):
    assert [each["second"] for each in ranks] == ["the block: rank 1's reason"] * 2
    assert [each["none"] for each in ranks] == ["", ""]


def test_a_download_that_fails_on_the_first_rank_ends_the_others_too(ranks):
    for each in ranks:
        assert "model nobody/nothing: it is no local folder, and the hub did not" in each["hub"]


def test_values_are_gathered_in_the_order_of_the_ranks(ranks):
    assert [each["gathered"] for each in ranks] == [[0, 1], [0, 1]]
