"""The parser behind every stage's command line: flags, help, and errors with nearest names.

The common flags are listed here. Every field of megatron-core's configuration is a flag too
(``flags.json``), under its own name in kebab case, as are Megatron-LM's other spellings
(``spellings.py``); ``--help-all`` shows those. What the values mean together is in
``arguments.py``. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from post_training.common.errors import UsageError, nearest, suggest
from post_training.config import megatron_spellings
from post_training.config.flags import spelled as flag
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
            kind = kinds.get(value[1], f"a value of type {value[1]}")
            what, cause, remedy = f"{what} {value[2]}", f"it is not {kind}", f"give {kind}"
        raise UsageError(what, cause, remedy)

    def spelled(self) -> set[str]:
        """Every flag this parser knows."""
        return {name for action in self._actions for name in action.option_strings}

    def split(self, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parse ``words`` into (defaults of everything, values that were given), by name.

        A flag that asks for help prints it and exits with code 0.

        Raises:
            UsageError: for an unknown flag, or a value that does not fit.
        """
        if {"-h", "--help", "--help-all"} & set(words):
            self.print_help()
            self.exit()
        defaults: dict[str, Any] = {}
        for action in self._actions:
            value = action.default
            if argparse.SUPPRESS not in (action.dest, value) and defaults.get(action.dest) is None:
                # A default that is text is converted as a given value is.
                convert = action.type if isinstance(value, str) else None
                defaults[action.dest] = convert(value) if callable(convert) else value
            action.default = argparse.SUPPRESS
        given, unknown = self.parse_known_args(words)
        if unknown:
            self._refuse(unknown)
        return defaults, vars(given)

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if not flags:
            raise UsageError(
                f"argument {unknown[0]!r}",
                "a value stands where a flag is expected",
                "put the flag before it, and quote values with spaces",
            )
        also = f" (so are {', '.join(flags[1:])})" if len(flags) > 1 else ""
        found = nearest(flags[0], self.spelled())
        raise UsageError(
            flags[0],
            f"unknown flag{also}",
            f"Did you mean: {', '.join(found)}?" if found else "`--help-all` lists every flag",
        )


def make_parser(
    stage: str,
    add_stage_arguments: Callable[[argparse.ArgumentParser], None],
    show_all: bool,
    description: str | None = None,
) -> Parser:
    """The parser of ``stage``; ``show_all`` puts every flag into its help.

    The stage's own flags come first in the help, and replace common ones of the same name.
    """
    parser = Parser(
        prog=f"{stage}.py",
        usage=f"python {stage}.py [flags]",
        description=description or getattr(sys.modules.get("__main__"), "__doc__", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add_stage_arguments(parser)
    _add_common(_Group(parser, "common flags", show=True))
    _add_model(_Group(parser, "the model (the conf sets these)", show_all))
    _add_fields(_Group(parser, "all fields of TransformerConfig", show_all))
    _add_spellings(_Group(parser, "Megatron-LM's spellings", show_all))
    return parser


class _Group:
    """A titled group of common flags. Names that the stage has taken are left to the stage."""

    def __init__(self, parser: Parser, title: str, show: bool) -> None:
        self.group = parser.add_argument_group(title)
        self.show = show
        self.taken = parser.spelled()

    def add(self, *names: str, help: str, **options: Any) -> None:
        free = [name for name in names if name not in self.taken]
        if free:
            text = help if self.show else argparse.SUPPRESS
            self.group.add_argument(*free, help=text, **options)


def _add_common(group: _Group) -> None:
    add = group.add
    add("--help", "-h", action="store_true", help="show the common flags and exit")
    add("--help-all", action="store_true", help="show every flag and exit")
    add("--check", action="store_true", help="check everything that needs no weights, and exit")
    add("--dry-run", action="store_true", help="show model, parameters per rank, processes and "
        "launch line, and exit; loads nothing, inputs may be missing")  # fmt: skip
    add("--load", metavar="DIR", help="Megatron checkpoint to load")
    add("--save", metavar="DIR", help="folder for the Megatron checkpoint")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--pretrained-model-path", metavar="DIR", help="Hugging Face folder or hub name")
    add("--tokenizer-model", metavar="DIR", help="tokenizer folder or hub name")
    add("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer",
        help="the only type there is")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run Python code that the model brings")
    add("--seed", type=int, default=1234, metavar="N", help="default: %(default)s")
    add("--distributed-timeout-minutes", type=int, default=10, metavar="N",
        help="limit of a collective operation (default: %(default)s)")  # fmt: skip
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info",
        help="default: %(default)s")  # fmt: skip
    add("--fp32", action="store_true", help="float32, whatever the conf says")
    add("--export-te-mcore-model", action="store_true", help="Transformer Engine layer spec")
    add("--export-default-te-spec", action="store_true", help="megatron-core's fused-norm spec")
    add("--export-force-local-attention", action="store_true", help="attention in plain PyTorch")
    add("--export-model-type", choices=MODEL_TYPES, default="GPTModel", help="default: %(default)s")


def _add_model(group: _Group) -> None:
    add = group.add
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
    add("--enable-gpt-oss", action="store_true", help="gpt-oss' rotary scaling")


class _Constants(argparse.Action):
    """A flag without a value that sets the fields of ``const``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        for name, value in dict(self.const or {}).items():
            setattr(namespace, name, value)


class _Ignored(argparse.Action):
    """A flag without meaning here; its name is remembered."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.ignored_flags = [*getattr(namespace, "ignored_flags", []), str(option_string)]


class _OneOrMore(argparse.Action):
    """A single value is kept as it is, several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _add_fields(group: _Group) -> None:
    for name, entry in transformer_fields.load().items():
        if flag(name) not in megatron_spellings.WITHOUT_MEANING:
            _add_field(group, name, entry)


def _add_field(group: _Group, name: str, entry: Mapping[str, Any]) -> None:
    other = [alias for alias, target in megatron_spellings.ALIASES.items() if target == name]
    other += entry.get("spellings", [])
    kind, default = entry["type"], entry["default"]
    text = entry["help"].replace("%", "%%")
    if kind == "bool":
        # Megatron-LM's other name of a field that is on by default switches it off.
        on, off = [flag(name)], [flag("no-" + name)]
        (off if default else on).extend(other)
        group.add(*on, dest=name, action="store_true", default=default, help=text)
        opposite = f"the opposite of {flag(name)}"
        group.add(*off, dest=name, action="store_false", default=default, help=opposite)
        return
    options: dict[str, Any] = {"dest": name, "default": default}
    if kind in ("words", "floats"):
        options |= {"nargs": "+", "action": _OneOrMore, "metavar": "VALUE"}
        options["type"] = float if kind == "floats" else str
    elif kind in ("choice", "dtype"):
        options |= {"choices": entry["choices"], "type": type(entry["choices"][0])}
    else:
        converters = {"int": int, "float": float, "numbers": numbers}
        options |= {"type": converters.get(kind, str), "metavar": kind.upper()}
    group.add(flag(name), *other, help=text, **options)


def _add_spellings(group: _Group) -> None:
    for name, constants in megatron_spellings.CONSTANTS.items():
        shown = "sets " + ", ".join(f"{n} = {v}" for n, v in constants.items())
        group.add(
            name, action=_Constants, nargs=0, const=constants, dest=argparse.SUPPRESS, help=shown
        )
    for name, count in megatron_spellings.WITHOUT_MEANING.items():
        group.add(
            name,
            action=_Ignored,
            nargs=None if count == 1 else count,  # one value is nargs=None to argparse
            dest="ignored_flags",
            metavar="VALUE",
            help="no meaning here",
        )


def numbers(text: str) -> int | list[int]:
    """A number, or a list of numbers: ``4``, ``127,0``, ``[0,1]``, ``([0]*3+[1]*58)*2``.

    Megatron-LM evaluates such text as Python; here only lists, ``+``, ``*`` and parentheses are
    read. Raises argparse.ArgumentTypeError for anything else.
    """
    try:
        return _number_or_list(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor a list such as 127,0 or [0]*3+[1]*58"
        ) from error


def _number_or_list(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _number_or_list(node.operand)
        if isinstance(operand, int):
            return -operand
    if isinstance(node, ast.List | ast.Tuple):
        items = [_number_or_list(item) for item in node.elts]
        if all(isinstance(item, int) for item in items):
            return [item for item in items if isinstance(item, int)]
    if isinstance(node, ast.BinOp):
        left, right = _number_or_list(node.left), _number_or_list(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right > 4096:
                raise ValueError("too long")
            return left * right
    raise ValueError("not a number or list")
