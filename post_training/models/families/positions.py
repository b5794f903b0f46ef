"""Rotary positions of ``config.json``, for attention without latents: base, part and scaling.

``models/rotary.py`` computes the tables that megatron-core's own classes do not have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from post_training.models.families import windows
from post_training.models.families.refusal import refuse

# What megatron-core's Llama 3 scaling has fixed (rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NOT_COMPUTED = {
    "longrope": "its frequencies change where a text passes the original length, and of "
    "transformers' models Phi-3's alone computes earlier tokens again then; vLLM takes the long "
    "ones for all",
}


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary scaling that a file states, in either form.

    UsageError where both forms are there and differ, or where it is one for each kind of layer.
    """
    scaling, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if scaling and newer and scaling != newer:
        refuse("rope_scaling and rope_parameters", "they differ, and readers take one of them")
    scaling = scaling or newer
    if any(isinstance(value, Mapping) for value in scaling.values()):
        refuse(f"rope_parameters of {', '.join(scaling)}", "layers are rotated differently")
    return dict(scaling)


def of_each_kind(
    config: Mapping[str, Any], base: float, local_base: float
) -> tuple[dict[str, Any], float]:
    """``config`` with the rotation of its full layers in one form, and the base of the others.

    transformers 5 writes ``rope_parameters`` with an entry for each kind of layer; in the older
    form ``rope_theta`` and ``rope_scaling`` are those of full layers.

    Args:
        base: of full layers, where the file does not state it; ``local_base`` of those within a
            window.

    Raises:
        UsageError: for a scaling of the layers within a window, or one that states no kind.
    """
    found = dict(config.get("rope_parameters") or {})
    full = dict(found.pop(windows.FULL, None) or {})
    local = dict(found.pop(windows.SLIDING, None) or {})
    if found:
        refuse(f"rope_parameters with {', '.join(found)}", "each kind of layer needs its own")
    older = config.get("rope_scaling") or {}
    if older and full and older != full:
        refuse("rope_scaling and rope_parameters", "they differ, and readers take one of them")
    if (kind := local.get("rope_type", "default")) != "default":
        refuse(f"rope type {kind!r} of layers within a window", "only unscaled ones are computed")
    if further := local.keys() - {"rope_type", "rope_theta"}:
        refuse(f"{', '.join(sorted(further))} of layers within a window", "it is not computed")
    theta = full.get("rope_theta", config.get("rope_theta", base))
    plain = {key: value for key, value in config.items() if key != "rope_parameters"}
    local_base = float(local.get("rope_theta", local_base))
    return {**plain, "rope_theta": theta, "rope_scaling": {**older, **full}}, local_base


def read(config: Mapping[str, Any], *, partial_rotary: bool, interleaved: bool) -> dict[str, Any]:
    """Architecture's values for the positions, from either form of the file.

    transformers 5 writes ``rope_parameters`` with ``rope_theta`` inside; earlier versions wrote
    ``rope_theta`` and ``rope_scaling`` (null without scaling) at the top level.

    Args:
        partial_rotary: whether the family's models heed ``partial_rotary_factor``.
        interleaved: whether they rotate neighbouring values of a head.

    Raises:
        UsageError: for a scaling that is not computed, and for files whose readers disagree about
            what is rotated.
    """
    scaling = rope_scaling(config)
    if scaling.get("rope_theta", 0) is None:
        refuse("rope_parameters: rope_theta = None", "the base of the rotation is needed")
    stated = {**config, **scaling}
    values = {
        "rotary_base": float(stated.get("rope_theta", 10000.0)),
        "rotary_percent": float(stated.get("partial_rotary_factor", 1.0)),
    }
    if values["rotary_percent"] != 1.0 and not partial_rotary:
        refuse(
            f"partial_rotary_factor = {values['rotary_percent']:g}",
            "transformers' model of this family ignores it, and other readers do not",
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return values
    readers = {"llama3": _llama3, "linear": _linear, "dynamic": _dynamic, "yarn": yarn}
    if kind not in readers:
        known = f"known are default, {', '.join(readers)}"
        refuse(f"rope type {kind!r}", _NOT_COMPUTED.get(kind, known))
    if kind == "yarn" and interleaved:
        refuse("rope type 'yarn'", "megatron-core's YaRN rotates no neighbouring values")
    _check_original_length(config, scaling)
    return values | readers[kind]({**config, **scaling, "rope_type": kind})


def _check_original_length(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> None:
    """transformers takes a length of the file over the one of the scaling; others do not."""
    key = "original_max_position_embeddings"
    if config.get(key, scaling.get(key)) != scaling.get(key):
        refuse(f"{key} = {config[key]!r}", f"it is {scaling.get(key)!r} in the rotary scaling")


def _number(stated: Mapping[str, Any], key: str, least: float = 1.0) -> float:
    value = stated.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
        refuse(f"rope scaling {key} = {value!r}", f"a number from {least:g} on is needed")
    return float(value)


def _llama3(stated: Mapping[str, Any]) -> dict[str, Any]:
    constants = {key: _number(stated, key, 0.0) for key in _LLAMA3_SCALING}
    if not 0 < constants["low_freq_factor"] <= constants["high_freq_factor"]:
        refuse(
            f"rope scaling low_freq_factor = {constants['low_freq_factor']!r}, "
            f"high_freq_factor = {constants['high_freq_factor']!r}",
            "the second one must not be smaller",
        )
    factor = _number(stated, "factor")
    values = {"rope_scaling": True, "rope_scaling_factor": factor}
    if constants == _LLAMA3_SCALING:
        return values
    return values | {"rope_parameters": {"rope_type": "llama3", "factor": factor, **constants}}


def _linear(stated: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "linear", "factor": _number(stated, "factor")}}


def _dynamic(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The length from which on the frequencies shrink is the file's longest."""
    key = "original_max_position_embeddings"
    longest = _number(stated, "max_position_embeddings")
    if stated.get(key, longest) != longest:
        refuse(
            f"rope scaling {key} = {stated[key]!r}",
            f"transformers scales beyond max_position_embeddings = {longest:g}, others beyond it",
        )
    factor = _number(stated, "factor")
    return {"rope_parameters": {"rope_type": "dynamic", "factor": factor, key: longest}}


def longrope(stated: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Frequencies divided one by one: by some up to the original length, by others beyond it.

    Args:
        stated: the scaling, and the file's ``max_position_embeddings``.
        pairs: of rotated values of a head.
    """
    key = "original_max_position_embeddings"
    original = _number(stated, key, 2.0)
    values: dict[str, Any] = {"rope_type": "longrope", key: original}
    for name in ("short_factor", "long_factor"):
        found = stated.get(name)
        numbers = isinstance(found, list) and all(type(each) in (int, float) for each in found)
        if not isinstance(found, list) or not numbers or len(found) != pairs or min(found) <= 0:
            refuse(f"rope scaling {name} = {found!r}", f"{pairs} numbers above 0 are needed")
        values[name] = [float(each) for each in found]
    factor = stated.get("factor")
    factor = _number(stated, "max_position_embeddings") / original if factor is None else factor
    own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    given = stated.get("attention_factor")
    values["attention_factor"] = own if given is None else _number(stated, "attention_factor", 0.0)
    return {"rope_parameters": values}


def yarn(stated: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's values by the names that megatron-core's GPTModel reads."""
    for key in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        if stated.get(key) is not None:
            refuse(f"rope scaling {key} = {stated[key]!r}", "only files without it are read")
    factor, own = stated.get("attention_factor"), 0.1 * math.log(stated.get("factor") or 1) + 1.0
    if factor is not None and not math.isclose(factor, own, rel_tol=1e-9):
        refuse(f"rope scaling attention_factor = {factor!r}", f"only {own!r} is computed")
    return {
        "position_embedding_type": "yarn",
        "yarn": {
            "rotary_scaling_factor": _number(stated, "factor"),
            "original_max_position_embeddings": int(
                _number(stated, "original_max_position_embeddings")
            ),
            "beta_fast": float(stated.get("beta_fast") or 32),
            "beta_slow": float(stated.get("beta_slow") or 1),
            "correction_range_round_to_int": stated.get("truncate", True),
        },
    }
