"""The parser behind every stage's command line: flags, help, and errors with nearest names.

The common flags are listed here and in ``options.py``. Every field of megatron-core's configuration
is a flag too (``transformer_fields.json``), under its own name in kebab case, as are Megatron-LM's
other spellings (``megatron_spellings.py``); ``--help-all`` shows those. What the values mean
together is in ``arguments.py``. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from post_training.common.errors import UsageError, suggest
from post_training.config import flags, megatron_spellings, other_stages
from post_training.config.flags import spelled
from post_training.config.options import StageOptions
from post_training.models import transformer_fields
from post_training.models.architecture import MODEL_TYPES, POSITION_EMBEDDINGS


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors that name the value and the nearest names."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError for argparse's ``message``."""
        found = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        what, cause = (found[1], found[2]) if found else ("command line", message)
        remedy = f"`python {self.prog} --help` shows the flags"
        choice = re.match(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", cause)
        value = re.match(r"invalid (\S+) value: '(.*)'", cause)
        if choice:
            known = [name.strip(" '") for name in choice[2].split(",")]
            what, cause = f"{what} {choice[1]}", f"the values are {', '.join(known)}"
            remedy = suggest(choice[1], known) or f"choose one of {', '.join(known)}"
        elif value:
            kinds = {"int": "a whole number", "float": "a number"}
            kinds["number_or_auto"] = "a whole number or auto"
            kind = kinds.get(value[1], f"a value of type {value[1]}")
            what, cause, remedy = f"{what} {value[2]}", f"it is not {kind}", f"give {kind}"
        raise UsageError(what, cause, remedy)

    def spelled(self) -> set[str]:
        """Every flag this parser knows."""
        return {name for action in self._actions for name in action.option_strings}

    def split(self, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse ``words`` into (defaults of everything, values that were given), by name.

        A flag that asks for help prints it and exits with code 0. UsageError for an unknown flag,
        or a value that does not fit.
        """
        if {"-h", "--help", "--help-all"} & set(words):
            self.print_help()
            self.exit()
        defaults = vars(self.parse_args([]))
        before = [action.default for action in self._actions]
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            given, unknown = self.parse_known_args(words)
        finally:
            for action, default in zip(self._actions, before, strict=True):
                action.default = default
        mistaken = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if mistaken:
            also = f" (so are {', '.join(mistaken[1:])})" if len(mistaken) > 1 else ""
            remedy = suggest(mistaken[0], self.spelled()) or "`--help-all` lists every flag"
            raise UsageError(mistaken[0], f"unknown flag{also}", remedy)
        if unknown:
            raise UsageError(
                f"argument {unknown[0]!r}",
                "a value stands where a flag is expected",
                "put the flag before it, and quote values with spaces",
            )
        return defaults, vars(given)


def make_parser(stage: str, options: type[StageOptions], show_all: bool) -> Parser:
    """The parser of ``stage``; ``show_all`` puts every flag into its help.

    The stage's own flags come first in the help, and replace common ones of the same name.
    """
    parser = Parser(
        prog=f"{stage}.py",
        usage=f"python {stage}.py [flags]",
        description=getattr(sys.modules.get("__main__"), "__doc__", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    flags.add(parser, options, stage, inherited=dataclasses.fields(StageOptions))
    _add_common(_Group(parser, "common flags", show=True))
    _add_model(_Group(parser, "the model (the conf sets these)", show_all))
    _add_transformer_fields(_Group(parser, "all fields of TransformerConfig", show_all))
    _add_spellings(_Group(parser, "Megatron-LM's spellings", show_all))
    _add_unused(_Group(parser, "flags without a use in this stage", show_all))
    return parser


class _Group:
    """A titled group of common flags. Names that the stage has taken are left to the stage."""

    def __init__(self, parser: Parser, title: str, show: bool) -> None:
        self.group = parser.add_argument_group(title)
        self.show = show
        self.taken = parser.spelled()

    def add_argument(self, *names: str, help: str, **options: Any) -> None:
        free = [name for name in names if name not in self.taken]
        if free:
            text = help if self.show else argparse.SUPPRESS
            self.group.add_argument(*free, help=text, **options)


def _add_common(group: _Group) -> None:
    add = group.add_argument
    add("--help", "-h", action="store_true", help="show the common flags and exit")
    add("--help-all", action="store_true", help="show every flag and exit")
    flags.add_fields(group, StageOptions, dataclasses.fields(StageOptions), {})
    add("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer",
        help="the only type there is")  # fmt: skip
    add("--fp32", action="store_true", help="float32, whatever the conf says")
    add("--export-te-mcore-model", action="store_true", help="Transformer Engine layer spec")
    add("--export-default-te-spec", action="store_true", help="megatron-core's fused-norm spec")
    add("--export-force-local-attention", action="store_true", help="attention in plain PyTorch")
    add("--export-model-type", choices=MODEL_TYPES, default="GPTModel", help="default: %(default)s")


def _add_model(group: _Group) -> None:
    add = group.add_argument
    add("--vocab-size", type=int, metavar="N", help="rows of the embedding, before padding")
    add("--padded-vocab-size", type=int, metavar="N", help="rows of the embedding")
    add("--make-vocab-size-divisible-by", type=int, metavar="N",
        help="pad the vocabulary to a multiple of N x tensor parallel size")  # fmt: skip
    add("--max-position-embeddings", type=int, metavar="N", help="longest text, in tokens")
    add("--seq-length", type=int, metavar="N", help="length of sequences, in tokens")
    add("--position-embedding-type", choices=POSITION_EMBEDDINGS, help="default: rope")
    add("--use-rope-scaling", dest="rope_scaling", action="store_true", help="as in Llama 3")
    add("--rope-scaling-factor", type=float, metavar="X", help="Llama 3's factor (default: 8)")
    add("--untie-embeddings-and-output-weights", action="store_true",
        help="the output layer has weights of its own")  # fmt: skip
    add("--group-query-attention", action="store_true", help="with --num-query-groups")
    add("--hybrid-layer-pattern", "--hybrid-override-pattern", metavar="TEXT",
        help="layers of a hybrid model: M mamba, * attention, - MLP, E experts")  # fmt: skip
    add("--rotary-seq-len-interpolation-factor", type=_one, metavar="1",
        help="positions are divided by it; 1 is the only value")  # fmt: skip


class _Constants(argparse.Action):
    """A flag without a value that sets the fields of ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        vars(namespace).update(self.const)


class _Ignored(argparse.Action):
    """A flag whose value is not read; its name is remembered in a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        names = getattr(namespace, self.dest, [])
        setattr(namespace, self.dest, [*names, str(option_string)])


class _OneOrMore(argparse.Action):
    """A single value is kept as it is, several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _add_transformer_fields(group: _Group) -> None:
    for name, entry in transformer_fields.load().items():
        if spelled(name) in megatron_spellings.WITHOUT_MEANING:
            continue
        other = [alias for alias, target in megatron_spellings.ALIASES.items() if target == name]
        other += entry.get("spellings", [])
        kind, text = entry["type"], entry["help"].replace("%", "%%")
        common = {"dest": name, "default": entry["default"]}
        if kind == "bool":
            # Megatron-LM's other name of a field that is on by default switches it off.
            on, off = [spelled(name)], [spelled("no-" + name)]
            (off if entry["default"] else on).extend(other)
            group.add_argument(*on, action="store_true", help=text, **common)
            opposite = f"the opposite of {spelled(name)}"
            group.add_argument(*off, action="store_false", help=opposite, **common)
            continue
        options: dict[str, Any] = {"type": _TYPES.get(kind, str), "metavar": kind.upper()}
        if kind in ("words", "floats"):
            options |= {"nargs": "+", "action": _OneOrMore, "metavar": "VALUE"}
        elif kind in ("choice", "dtype"):
            options = {"choices": entry["choices"], "type": type(entry["choices"][0])}
        group.add_argument(spelled(name), *other, help=text, **common, **options)


def _add_spellings(group: _Group) -> None:
    for name, constants in megatron_spellings.CONSTANTS.items():
        shown = "sets " + ", ".join(f"{n} = {v}" for n, v in constants.items())
        group.add_argument(
            name, action=_Constants, nargs=0, const=constants, dest=argparse.SUPPRESS, help=shown
        )
    for name, count in megatron_spellings.WITHOUT_MEANING.items():
        _add_ignored(group, name, count, "ignored_flags", "no meaning here")


def _add_unused(group: _Group) -> None:
    for name, (count, reason) in other_stages.UNUSED.items():
        _add_ignored(group, name, count, "unused_flags", reason)


def _add_ignored(group: _Group, name: str, count: int | str, dest: str, text: str) -> None:
    group.add_argument(
        name,
        action=_Ignored,
        nargs=None if count == 1 else count,  # one value is nargs=None to argparse
        dest=dest,
        metavar="VALUE",
        help=text,
    )


def _one(text: str) -> float:
    """1, in any spelling: no linear scaling of positions."""
    if float(text) != 1:
        raise argparse.ArgumentTypeError("positions are not scaled linearly here; give 1")
    return 1.0


def numbers(text: str) -> int | list[int]:
    """A number, or a list of numbers: ``4``, ``127,0``, ``[0,1]``, ``([0]*3+[1]*58)*2``.

    Megatron-LM evaluates such text as Python; here only lists, ``+``, ``*`` and parentheses are
    read. Raises argparse.ArgumentTypeError for anything else.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        is_list = isinstance(node, ast.List | ast.Tuple | ast.BinOp)
        return _list(node) if is_list else _number(node)
    except (SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor a list such as 127,0 or [0]*3+[1]*58"
        ) from error


def _number(node: ast.expr) -> int:
    value = ast.literal_eval(node)
    if type(value) is not int:
        raise ValueError("not a whole number")
    return value


def _list(node: ast.expr) -> list[int]:
    match node:
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_number(item) for item in items]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _list(left) + _list(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            numbers, times = _list(left), _number(right)
            if len(numbers) * times <= 4096:
                return numbers * times
    raise ValueError("not a list of whole numbers")


_TYPES = {"int": int, "float": float, "floats": float, "numbers": numbers}
