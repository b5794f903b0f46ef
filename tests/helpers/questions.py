"""Multiple-choice questions about nothing, in MMLU's layout."""

from __future__ import annotations

import json
from pathlib import Path

SUBJECTS = ("art", "us_law", "zoology")
FEW_SHOTS = 2


def write_questions(folder: Path) -> Path:
    """Three subjects with 7 test questions of different lengths and 2 solved ones each."""
    for split, count in (("test", 7), ("dev", FEW_SHOTS)):
        rows = [
            {
                "question": f"{split} {number} of {subject}: " + "what is it? " * (number % 3 + 1),
                "subject": subject,
                "choices": [f"{word} {number}" for word in ("red", "green", "blue", "grey")],
                "answer": (number * 7 + len(subject)) % 4,
            }
            for subject in SUBJECTS
            for number in range(count)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder
