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
    searches,
)
from post_training.reporting.document import Document


def build(folders: Sequence[Path]) -> tuple[Document, int]:
    """The report of all stages' records below the folders, and how many those are."""
    collected = records.collect(folders)
    # A search's trials are measurements without an output, and are reported together.
    of_searches = [each for each in collected.records if each.stage == searches.STAGE]
    found = chain.build([each for each in collected.records if each not in of_searches])
    problems = list(collected.problems)
    sections = [
        *(overview.sections(found) if found.nodes or not of_searches else []),
        *searches.sections(of_searches),
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
