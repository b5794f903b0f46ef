"""What quantize says about the calibration tokens of experts."""

from __future__ import annotations

import pytest

from post_training.common import report
from post_training.quantization import expert_table


def used(*layers, added=()):
    """Of :class:`Calibration`, for its layers with experts from 1 on."""
    return {
        "expert_tokens": {str(n): list(each) for n, each in enumerate(layers, 1)},
        "expert_tokens_added": {str(n): list(each) for n, each in enumerate(added, 1)},
    }


def rows(calibration):
    columns = expert_table.table(calibration).columns
    return [tuple(each) for each in zip(*(column.cells for column in columns), strict=True)]


def test_a_row_tells_the_spread_and_names_the_experts_without_tokens():
    found = rows(used([5, 0, 2, 0, 0, 1000], [4, 4, 4, 4, 4, 4]))
    assert found[0] == ("1", "6", "0", "1", "1,000", "3: 1, 3-4")
    assert found[1] == ("2", "6", "4", "4", "4", "0")


def test_of_many_layers_the_worst_are_shown_in_order_and_the_others_summed_up():
    layers = [[9, 9, n] for n in range(1, 41)]
    layers[29] = [18, 0, 0]
    *shown, last = rows(used(*layers))
    assert [each[0] for each in shown] == [*map(str, range(1, 12)), "30"]
    assert last == ("28 others", "84", "9", "9", "40", "0")


def test_tokens_beyond_the_routers_are_told_apart():
    calibration = used([6, 0, 2], [3, 3, 2], added=[[2, 8, 6], [5, 5, 6]])
    assert rows(calibration)[0] == ("1", "3", "0", "2", "6", "8 or more", "1: 1")
    text = expert_table.describe(calibration)
    assert text == "6 in 2 layers, 8 tokens each; the router chose 1 of them for none"


def test_the_summary_tells_what_experts_without_tokens_have():
    text = expert_table.describe(used([6, 0, 2], [0, 8, 0]))
    assert text.startswith("3 of 6 got no calibration token: their inputs have the scale of their")
    assert expert_table.describe(used([6, 1, 2])) == "3 in 1 layer, 1 to 6 tokens each"


@pytest.mark.parametrize(
    ("numbers", "most", "text"),
    [
        ([1, 2, 3, 5], None, "1-3, 5"),
        ([1, 2, 3, 5], 2, "1-3, 5"),
        ([0, 2, 3, 5, 7, 8], 2, "0, 2-3 and 3 more"),
        ([], 2, ""),
    ],
)
def test_ranges_of_numbers(numbers, most, text):
    assert report.ranges(numbers, most) == text
