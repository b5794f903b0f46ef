"""A report of folders: what is there, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from post_training.reporting import (
    chain,
    comparisons,
    curves,
    drafts,
    layers,
    overview,
    provenance,
    records,
    scores,
)
from post_training.reporting.document import Document


def build(folders: Sequence[Path]) -> tuple[Document, int]:
    """The report of all stages' records below the folders, and how many those are."""
    collected = records.collect(folders)
    found = chain.build(collected.records)
    problems = list(collected.problems)
    sections = [
        *overview.sections(found),
        *comparisons.sections(found, problems),
        *scores.sections(found),
        *layers.sections(found),
        *drafts.sections(found),
        *curves.sections(found, problems),
        *provenance.sections(found, problems),
    ]
    names = ", ".join(folder.resolve().name or str(folder) for folder in folders)
    subtitle = provenance.subtitle(found, collected.records)
    return Document(f"Report of {names}", subtitle, sections), len(collected.records)
