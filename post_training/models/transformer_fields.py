"""The table of megatron-core's configuration, ``transformer_fields.json``. No torch.

Every field of ``TransformerConfig`` and ``MLATransformerConfig`` that a command line can express is
an entry: name, type, default, choices, and the field's own documentation as help. Reading the table
takes milliseconds, importing megatron-core seconds: ``--help`` and usage errors are immediate.
``tests/helpers/flags_table.py`` makes the file from the installed megatron-core.

Types: ``int float str bool choice dtype``; ``numbers`` (a number, or a list such as ``127,0``,
``[0,1]`` or ``[0]*3+[1]*58``); ``words`` and ``floats`` (one or more values after the flag).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from post_training.common import files

FILE = Path(__file__).with_name("transformer_fields.json")
DTYPES = ("fp32", "bf16", "fp16")


@functools.cache
def load() -> dict[str, dict[str, Any]]:
    """The table: field name -> entry with ``type``, ``default``, ``help`` and perhaps more.

    Optional keys: ``choices``; ``spellings``, Megatron-LM's other names for the flag;
    ``mla_default``, the default with multi-latent attention if it differs.
    """
    return files.read_json_object(FILE, "file of this package", "install it again")
