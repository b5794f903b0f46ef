"""Which output was made from which, and what was measured of each: a graph of records.

An input is found by the hash of its manifest, wherever it lies now; by its path, if what lies there
was made again since, and what was measured of it is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from post_training.common import inputs
from post_training.reporting import values
from post_training.reporting.records import Record

MODEL, REFERENCE, CHECKPOINT = "model", "reference", "checkpoint"
_OF_MODELS = (MODEL, REFERENCE, "teacher", "target", "draft")  # roles of inputs


@dataclass(eq=False)
class Node:
    """An output, or a model that no stage made (``record`` is None).

    Attributes:
        path: of the folder, or the hub's name.
        links: what it was made from.
        reports: measurements of it as it is; ``outdated`` ones are of what lay there before.
        references: measurements of others beside it.
    """

    path: str
    record: Record | None = None
    links: list[Link] = field(default_factory=list)
    reports: list[Record] = field(default_factory=list)
    outdated: list[Record] = field(default_factory=list)
    references: list[Record] = field(default_factory=list)

    @property
    def name(self) -> str:
        return Path(self.path).name or self.path if self.record else hub_name(self.path)

    @property
    def stage(self) -> str:
        return self.record.stage if self.record else "source"

    @property
    def content(self) -> Mapping[str, Any]:
        return self.record.content if self.record else {}

    @property
    def metrics(self) -> Mapping[str, Any]:
        return values.mapping(self.content, "metrics")

    @property
    def parent(self) -> Node | None:
        """The model that it was made from, the first of several."""
        return next((link.node for link in self.links if link.role == MODEL), None)

    @property
    def origin(self) -> Node:
        """The first output of its line: what it is compared with."""
        node = self
        while node.parent is not None and node.parent.record is not None:
            node = node.parent
        return node


@dataclass(frozen=True)
class Link:
    """An input: as it is now (``current``), or as it was before it was made again."""

    node: Node
    role: str
    current: bool


@dataclass(frozen=True)
class Chain:
    """All nodes, each after those that it was made from, its line before others'."""

    nodes: list[Node]
    loose: list[Record]  # reports about what was not found

    @property
    def outputs(self) -> list[Node]:
        return [node for node in self.nodes if node.record is not None]

    def reference(self, record: Record) -> Node | None:
        """What a report compares its model with."""
        return next((node for node in self.nodes if record in node.references), None)

    def children(self, node: Node) -> list[Node]:
        return [each for each in self.nodes if each.parent is node]


def hub_name(path: str) -> str:
    """The name on the hub of a folder in its cache; of another the folder's name."""
    for part in Path(path).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path if inputs.is_hub_name(path) else Path(path).name or path


def build(records: Sequence[Record]) -> Chain:
    """The graph of what was recorded."""
    nodes = [Node(str(each.location), each) for each in records if each.is_output]
    known = _Known(nodes)
    for node in nodes:
        for entry in node.record.inputs if node.record else ():
            found = known.find(entry)
            if found is None or _reaches(found[0], node):
                continue
            if found[0] not in [link.node for link in node.links]:
                node.links.append(Link(found[0], values.text(entry, "role"), found[1]))
    loose = []
    for each in records:
        if each.is_output:
            continue
        measured = [known.find(entry) for entry in each.inputs if entry.get("role") == MODEL]
        if not measured or measured[0] is None:
            loose.append(each)
            continue
        node, current = measured[0]
        (node.reports if current else node.outdated).append(each)
        beside = [known.find(entry) for entry in each.inputs if entry.get("role") == REFERENCE]
        if current and beside and beside[0] is not None and beside[0][1]:
            beside[0][0].references.append(each)
    return Chain(list(_ordered(known.nodes)), loose)


class _Known:
    """Nodes by what inputs say of them; a model that no stage made becomes one when it is named."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self._by_path: dict[str, Node] = {str(Path(each.path).resolve()): each for each in nodes}
        self._by_hash = {each.record.sha256: each for each in nodes if each.record}

    def find(self, entry: Mapping[str, Any]) -> tuple[Node, bool] | None:
        """What an input is, and whether it is the same as then; None for data."""
        path, recorded = values.text(entry, "path"), values.text(entry, "manifest_sha256")
        if recorded in self._by_hash:
            return self._by_hash[recorded], True
        node = self._by_path.get(path)
        if node is not None:
            return node, node.record is None
        if not path or values.text(entry, "role") not in _OF_MODELS:
            return None
        self._by_path[path] = node = Node(path)
        self.nodes.append(node)
        return node, True


def _reaches(start: Node, goal: Node) -> bool:
    """Whether ``goal`` is among what ``start`` was made from; manifests of old paths may say so."""
    seen, pending = {id(start)}, [start]
    while pending:
        node = pending.pop()
        if node is goal:
            return True
        for link in node.links:
            if id(link.node) not in seen:
                seen.add(id(link.node))
                pending.append(link.node)
    return False


def _ordered(nodes: Sequence[Node]) -> Iterator[Node]:
    """Sources first; then each output when all that it was made from is there, line by line."""
    done: set[int] = set()
    pending = [node for node in nodes if not node.links]
    while pending:
        node = pending.pop(0)
        if id(node) in done:
            continue
        done.add(id(node))
        yield node
        ready = [
            each
            for each in nodes
            if id(each) not in done
            and any(link.node is node for link in each.links)
            and all(id(link.node) in done for link in each.links)
        ]
        pending = [*ready, *pending]
