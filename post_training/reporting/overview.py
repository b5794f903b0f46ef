"""The first sections of a report: in short, the chain of stages, before and after, plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from post_training.reporting import chain_picture, charts, comparable, measures, plots, values
from post_training.reporting.chain import CHECKPOINT, MODEL, Chain, Node
from post_training.reporting.document import (
    NOT_MEASURED,
    Block,
    Facts,
    Figure,
    Section,
    Table,
    Text,
    cut,
)
from post_training.reporting.measures import Measured, percent, significant
from post_training.reporting.records import Record

_MOST_ROWS = 200
_MOST_RESULTS = 24
_MOST_BOXES = 60
_MOST_POINTS = 60


def sections(chain: Chain) -> list[Section]:
    found = [Section("In short", [_in_short(chain)]), Section("Chain of stages", _chain(chain))]
    found.append(Section("Before and after", [_table(chain)]))
    if plots := _plots(chain):
        found.append(Section("Size and quality", plots))
    return found


def _in_short(chain: Chain) -> Block:
    """Of each result, which is what nothing else was made from."""
    ends = [node for node in chain.outputs if not chain.children(node)]
    facts = [(node.name, _facts(node)) for node in ends[:_MOST_RESULTS]]
    return Facts(facts) if facts else Text("No output of a stage was found.")


def _facts(node: Node) -> list[str]:
    origin, parts = node.origin, []
    size, before = measures.model_bytes(node), measures.model_bytes(origin)
    if measures.is_draft_alone(node):
        parts.append(f"a draft of {measures.shown_bytes(size)}")
    elif size is not None and before and origin is not node:
        parts.append(
            f"{measures.shown_bytes(size)} of weights, {100 * size / before:.0f} % of {origin.name}"
        )
    elif size is not None:
        parts.append(f"{measures.shown_bytes(size)} of weights")
    kind = measures.quantized_as(node)
    bits = measures.bits_per_weight(node)
    if bits is not None and not measures.is_draft_alone(node):
        parts.append(f"{kind + ', ' if kind else ''}{bits:.2f} bits per weight")
    scored = _scored(node)
    if scored is not None:
        own, score = scored
        parts.append(_cost(origin, own, score, node))
    kl = measures.kl_divergence(_measured_on(node))
    if kl is not None:
        parts.append(f"KL divergence {kl.shown(significant)}")
    accepted = measures.acceptance(node) or (
        measures.acceptance(node.parent) if node.parent and _has_draft(node) else None
    )
    if accepted is not None:
        parts.append(f"acceptance length {accepted.shown(lambda value: f'{value:.2f}')}")
    compared = values.number(node.metrics, "tensors_compared")
    if compared is not None:
        parts.append(f"read back: {compared:,.0f} tensors equal the model's")
    return parts or ["nothing was measured"]


def _has_draft(node: Node) -> bool:
    return measures.is_draft_alone(node) or bool(values.mapping(node.metrics, "draft"))


def _scored(node: Node) -> tuple[Node, Measured] | None:
    """A score of the node; of an export that of the checkpoint whose weights it has."""
    if measures.is_draft_alone(node):
        return None
    for each in (node, _measured_on(node)):
        if (found := measures.score(each)) is not None:
            return each, found
    return None


def _measured_on(node: Node) -> Node:
    """Of an export the checkpoint, which has the same weights and scales."""
    saved = next((link.node for link in node.links if link.role == CHECKPOINT), None)
    if saved is not None:
        return saved  # by the process that quantized and exported it
    parent = node.parent
    own = measures.score(node) or measures.kl_divergence(node)
    is_copy = node.stage == "export" and "quantization" not in node.content
    is_copy = is_copy and not measures.is_draft_alone(node)
    return parent if is_copy and parent is not None and own is None else node


def _cost(origin: Node, own: Node, score: Measured, node: Node) -> str:
    text = f"score {score.shown(percent, ' %')}"
    if own is not node:
        text += f", measured on {own.name}"
    found = measures.change(origin, own) if own is not origin else None
    if found is not None:
        text += f", a change of {measures.signed_with(*found)} points from {origin.name}"
    return text


def _chain(chain: Chain) -> list[Block]:
    if not chain.nodes:
        return [Text("No output of a stage was found.")]
    if len(chain.nodes) > _MOST_BOXES:
        return [Text(f"{len(chain.nodes)} outputs: too many for a picture; see the table.")]
    listed = "; ".join(
        f"{node.name} by {node.stage}" + (f" from {_made_from(node)}" if node.links else "")
        for node in chain.outputs
    )
    picture = Figure(
        "",
        chain_picture.wide(chain, _lines),
        f"Outputs and what they were made from: {listed}.",
        narrow=chain_picture.narrow(chain, _lines),
        wide=True,
    )
    blocks: list[Block] = [picture]
    links = [(node, link) for node in chain.nodes for link in node.links]
    others = [
        f"{node.name} from {link.node.name} ({link.role or 'input'})"
        for node, link in links
        if link.role != MODEL
    ]
    if others:
        blocks.append(Text(f"Dashed, models that were only read: {'; '.join(others)}."))
    old = sorted({link.node.name for _, link in links if not link.current})
    if old:
        blocks.append(
            Text(f"Made again after something was made from it (dotted): {', '.join(old)}.")
        )
    return blocks


def _made_from(node: Node) -> str:
    return ", ".join(
        link.node.name + ("" if link.role == MODEL else f" ({link.role})") for link in node.links
    )


def _lines(node: Node) -> chain_picture.Lines:
    if node.record is None:
        return chain_picture.Lines(node.name, "source", "")
    kind = measures.quantized_as(node)
    made = node.stage + (f" · {kind}" if kind else "")
    shown = []
    size = measures.model_bytes(node)
    if size is not None:
        shown.append(measures.shown_bytes(size))
    score, accepted = measures.score(node), measures.acceptance(node)
    if score is not None:
        shown.append(f"score {percent(score.value)} %")
    elif accepted is not None:
        shown.append(f"accepts {accepted.value:.2f}")
    return chain_picture.Lines(node.name, made, " · ".join(shown))


_Column = tuple[str, Callable[[Node], str], bool]  # heading, cell, shown if nothing was measured


type _Quantity = Callable[[Node], Measured | None]
type _Key = Callable[[Record], str]
_KL = (measures.kl_divergence, comparable.distributions)
_PERPLEXITY = (measures.perplexity, comparable.text)


def _marked(
    chain: Chain, quantity: _Quantity, key: _Key, write: Callable[[float], str]
) -> Callable[[Node], str]:
    """A column's cells, of which those that are not comparable have a star."""
    odd = {
        id(node) for node, _, same in comparable.measured(chain.outputs, quantity, key) if not same
    }
    return lambda node: _shown(quantity(node), write) + " *" * (id(node) in odd)


def _table(chain: Chain) -> Block:
    columns: list[_Column] = [
        ("output", lambda node: node.name, True),
        ("stage", lambda node: node.stage, True),
        ("weights", lambda node: measures.shown_bytes(measures.model_bytes(node)), True),
        ("bits per weight", _bits, True),
        ("parameters", _parameters, True),
        ("score, % (95 %)", _marked(chain, measures.score, comparable.questions, percent), True),
        ("change, points (95 %)", _change, True),
        ("KL divergence", _marked(chain, *_KL, significant), True),
        ("perplexity", _marked(chain, *_PERPLEXITY, measures.precise), True),
        ("acceptance length", lambda node: _shown(measures.acceptance(node), _two), False),
        ("decoding", measures.speed, False),
        ("files", lambda node: _files(node), True),
        ("stage's peak memory", lambda node: measures.memory(node.record), True),
        ("stage's time", lambda node: measures.seconds(node.record), True),
    ]
    rows = [[cell(node) for _, cell, _ in columns] for node in chain.outputs]
    kept = [
        number
        for number, (_, _, always) in enumerate(columns)
        if always or any(row[number] != NOT_MEASURED for row in rows)
    ]
    caption = (
        "Weights are those of an export's files, else parameters times bits; files are the weight "
        "files with their optimizer states. The change is from the first output of the same line; "
        "where the two were not evaluated side by side, its interval takes them for independent. "
        "- was not measured; * is of other questions, another text or another reference than most, "
        "or of rounded weights with inputs in 16 bits, and not comparable with the others."
    )
    shown = [[row[number] for number in kept] for row in rows]
    return Table(caption, [columns[number][0] for number in kept], cut(shown, _MOST_ROWS))


def _shown(found: Measured | None, write: Callable[[float], str]) -> str:
    return NOT_MEASURED if found is None else found.shown(write)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _bits(node: Node) -> str:
    found = measures.bits_per_weight(node)
    return NOT_MEASURED if found is None else f"{found:.2f}"


def _parameters(node: Node) -> str:
    found = measures.parameters(node)
    return NOT_MEASURED if found is None or measures.is_draft_alone(node) else f"{found:,}"


def _files(node: Node) -> str:
    return measures.shown_bytes(node.record.weight_bytes if node.record else None)


def _change(node: Node) -> str:
    found = measures.change(node.origin, node) if node.origin is not node else None
    return NOT_MEASURED if found is None else measures.signed_with(*found)


def _plots(chain: Chain) -> list[Block]:
    """Size against score, and against KL divergence, with the Pareto front."""
    found: list[Block] = []
    quantities: Sequence[tuple[str, _Quantity, _Key, float, bool]] = (
        ("score, %", measures.score, comparable.questions, 100.0, True),
        ("KL divergence", *_KL, 1.0, False),
        ("perplexity", *_PERPLEXITY, 1.0, False),
    )
    for title, quantity, key, scale, more_is_better in quantities:
        points = [
            (node.name, size / 1e6, scale * each.value, each.interval)
            for node, each, same in comparable.measured(chain.outputs, quantity, key)
            if same and (size := measures.model_bytes(node)) is not None
        ][:_MOST_POINTS]
        if len(points) < 2:
            continue
        front = plots.front([(x, y if more_is_better else -y) for _, x, y, _ in points])
        shown = [
            charts.Point(
                name, x, y, (scale * spread[0], scale * spread[1]) if spread else None, best
            )
            for (name, x, y, spread), best in zip(points, front, strict=True)
        ]
        found.append(plots.plot(title, shown))
    return found
