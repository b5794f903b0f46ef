"""The last sections: warnings, how each output was made, versions, files that were not read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from post_training.reporting import values
from post_training.reporting.chain import Chain
from post_training.reporting.document import Block, Code, Items, Section, Table, Text, cut
from post_training.reporting.records import Record

_MOST_ROWS = 200
_WIDTH = 98  # of a line of a command


def sections(chain: Chain, problems: Sequence[str]) -> list[Section]:
    records = list(_records(chain))
    found = [Section("Warnings", [_warnings(records)])]
    if problems:
        said = "These files were left out, as they could not be read:"
        found.append(Section("Files that were not read", [Text(said), Items(problems[:100])]))
    if records:
        found.append(Section("Commands", _commands(records)))
        found.append(Section("Versions", _versions(records)))
    return found


def _records(chain: Chain) -> Iterator[tuple[str, Record]]:
    """Each record with what it is of, outputs before what was measured of them."""
    for node in chain.nodes:
        if node.record is not None:
            yield node.name, node.record
        for each in (*node.outdated, *node.reports):
            yield each.path.name, each
    for each in chain.loose:
        yield each.path.name, each


def _warnings(records: Sequence[tuple[str, Record]]) -> Block:
    rows = []
    for name, record in records:
        said = [text for text in values.sequence(record.content, "warnings") if values.text(text)]
        if record.content.get("passed") is False:
            said.append("it fell short of a limit that the command gives")
        if record.content.get("complete") is False:
            said.append("the run is unfinished")
        said += [
            each for each in values.sequence(record.content, "broken_bounds") if values.text(each)
        ]
        left_out = values.text(record.metrics, "draft_left_out")
        said += [f"the draft was not exported: {left_out}"] if left_out else []
        rows += [[name, record.stage, str(text)] for text in said]
    if not rows:
        silent = [name for name, record in records if "warnings" not in record.content]
        text = "No stage warned of anything."
        if silent:
            text = (
                "No warning is recorded. Made by a version that recorded none: "
                f"{', '.join(silent[:20])}."
            )
        return Text(text)
    return Table("What stages warned of", ["of", "stage", "warning"], cut(rows, _MOST_ROWS))


def _commands(records: Sequence[tuple[str, Record]]) -> list[Block]:
    """Command lines as recorded, in an order in which they can run again."""
    blocks: list[Block] = [
        Text(
            "As recorded, secrets hidden, in an order in which they can run again. A stage that "
            "ran on several processes is started by torchrun, as its launcher (.sh) does."
        )
    ]
    for name, record in records[:_MOST_ROWS]:
        command = values.text(record.content, "command")
        if command:
            finished = values.text(record.content, "finished")
            title = f"{name}, by {record.stage}" + (f", finished {finished}" if finished else "")
            blocks.append(Code(title, _lines(f"python {command}")))
    return blocks


def _lines(command: str) -> str:
    """A command line in lines of a readable length, which a shell reads as one."""
    try:
        words = [shlex.quote(word) for word in shlex.split(command)]
    except ValueError:
        return command
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) < _WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}" if lines else word)
    return " \\\n".join(lines)


def _versions(records: Sequence[tuple[str, Record]]) -> list[Block]:
    """One table; a column for each set of versions, if there are several."""
    sets: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, record in records:
        versions = values.mapping(record.content, "versions")
        found = [(each, values.text(versions, each)) for each in versions]
        found.append(("git commit", values.text(record.content, "git_commit") or "-"))
        sets.setdefault(tuple(found), []).append(name)
    shown = list(sets)[:6]
    names = list(dict.fromkeys(name for each in shown for name, _ in each))
    columns = ["package"]
    for each in shown:
        users = sets[each]
        columns.append("version" if len(sets) == 1 else _few(users))
    rows_of = [dict(each) for each in shown]
    rows = [[name, *(each.get(name, "-") for each in rows_of)] for name in names]
    caption = f"Versions that made these outputs, {len(sets)} different sets"
    caption = caption if len(sets) > 1 else "Versions that made all of these"
    return [Table(caption, columns, cut(rows, _MOST_ROWS))]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def subtitle(chain: Chain, records: Sequence[Record]) -> str:
    """How much there is, and from when."""
    times = sorted(filter(None, (values.text(each.content, "finished") for each in records)))
    text = f"{len(chain.outputs)} outputs, {len(records) - len(chain.outputs)} measurements"
    return f"{text}; the last finished {times[-1]}" if times else text
