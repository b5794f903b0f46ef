"""Loading checkpoints without running what a stranger has put into them.

``torch_dist`` checkpoints hold pickles: ``.metadata``, the byte entries of ``*.distcp`` files
(arguments, random states, optimizer settings, ``_extra_state``), ``modelopt_state``, and
``common.pt`` of older ones. Python's ``pickle`` calls whatever a file names. Inside
:func:`only_known_classes` it constructs the classes that such files consist of and refuses all
others by name; nothing of a refused file has been called by then.
"""

from __future__ import annotations

import contextlib
import enum
import io
import logging
import pickle
import re
from collections.abc import Iterator
from typing import Any

from post_training.common.errors import UsageError, first_line
from post_training.distributed import signals

logger = logging.getLogger("post_training")

# Plain data, and what rebuilds tensors and arrays from bytes. Each is harmless with any arguments;
# torch's _load_from_bytes unpickles again, with the same restriction, and megatron-core's, which
# takes its place and its name in pickles once megatron-core is imported, with torch's own.
_KNOWN = {
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "argparse": {"Namespace"},
    "builtins": {"bytearray", "complex", "frozenset", "range", "set", "slice"},
    "collections": {"OrderedDict", "defaultdict", "deque"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "io": {"BytesIO"},
    "megatron.core.safe_globals": {"safe_load_from_bytes"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "torch": {"Size", "Tensor", "device"},
    "torch._utils": {
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"TypedStorage", "UntypedStorage", "_load_from_bytes"},
    "types": {"SimpleNamespace"},
}


# What parsing a damaged file raises. A RuntimeError may be anything else: a lost rank, no memory.
_OF_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,  # JSON and text too
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ImportError,
)


class UnknownClass(pickle.UnpicklingError):
    """A pickle names a class or function that checkpoints have no use for."""


_NAMED = re.compile(r"GLOBAL (\S+)")
_refused: list[
    UnknownClass
] = []  # in the block that is open; torch hides some in errors of its own


def _refuse(name: str) -> UnknownClass:
    _refused.append(UnknownClass(name))
    return _refused[-1]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module.partition(".")[0] in ("megatron", "torch", "modelopt"):
            # Importing a module of an installed package runs none of the file's code.
            found = super().find_class(module, name)
            if _is_harmless(found):
                return found
        raise _refuse(f"{module}.{name}")


def _is_harmless(found: Any) -> bool:
    """Whether it is an enum, a dtype, a storage, or registered with torch as safe to unpickle."""
    import torch

    if isinstance(found, torch.dtype):
        return True
    if isinstance(found, type) and issubclass(found, enum.Enum | torch.storage._LegacyStorage):
        return True
    registered = torch.serialization.get_safe_globals()
    return any((each[0] if isinstance(each, tuple) else each) is found for each in registered)


@contextlib.contextmanager
def only_known_classes(what: str) -> Iterator[None]:
    """Restrict every unpickling of this process, those of torch and megatron-core included.

    Args:
        what: is being loaded, in the message (``checkpoint <path>``).

    Raises:
        UsageError: if a file names anything else, or is damaged; on every rank of a collective
            load.
    """
    own = {"Unpickler": _Unpickler, "load": _load, "loads": _loads}
    before = {name: getattr(pickle, name) for name in own}
    _refused.clear()
    vars(pickle).update(own)
    try:
        with signals.unwrapped():
            yield
    except signals.Interrupted:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        unknown = _refused[0] if _refused else _unknown_class(error)
        damage = _damage(error)
        if unknown is None and damage is not None:
            cause = f"it cannot be read: {type(damage).__name__}: {first_line(damage)}"
            logger.debug("%s cannot be read", what, exc_info=True)
            remedy = "it is damaged, or made by other versions: copy or make it again"
            raise UsageError(what, cause, remedy) from error
        if unknown is None:
            raise
        raise UsageError(
            what,
            f"it names {unknown}, which no checkpoint needs: loading it could run any code",
            "do not use this file; get the checkpoint from its author again",
        ) from None
    finally:
        vars(pickle).update(before)


def _damage(error: BaseException) -> BaseException | None:
    """What reading bytes that no checkpoint has gives; torch wraps the errors of all ranks."""
    if isinstance(error, UsageError):
        return None
    if isinstance(error, _OF_DAMAGE) or str(error).startswith("PytorchStreamReader"):
        return error
    failures = [failure[0] for failure in getattr(error, "failures", {}).values()]
    return next((found for each in failures if (found := _damage(each)) is not None), None)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _loads(data: Any, **options: Any) -> Any:
    return _Unpickler(io.BytesIO(data), **options).load()


def _unknown_class(error: BaseException) -> UnknownClass | None:
    """Another rank's refusal; torch wraps the errors of all ranks into one of its own."""
    if isinstance(error, UnknownClass):
        return error
    if isinstance(error, pickle.UnpicklingError) and (found := _NAMED.search(str(error))):
        return UnknownClass(found[1])  # torch.load(weights_only=True), which has a list of its own
    behind = [error.__cause__, error.__context__]
    behind += [failure[0] for failure in getattr(error, "failures", {}).values()]
    unknown = (_unknown_class(each) for each in behind if each is not None)
    return next((each for each in unknown if each is not None), None)
