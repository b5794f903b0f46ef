"""Keys and values: what ``--export-kv-cache-quant`` takes, and ModelOpt's configurations."""

from __future__ import annotations

from post_training.quantization.formats.base import NO_KV_CACHE, Format, FormatFamily, KvCache

_NO_ZERO_POINTS = "engines read no zero points of keys and values"
_KV_CACHES = (
    KvCache("fp8", "FP8_KV_CFG", exported_as="FP8", bits=8.0),
    KvCache("fp8_affine", "FP8_AFFINE_KV_CFG", refused=_NO_ZERO_POINTS),
    KvCache("nvfp4", "NVFP4_KV_CFG", exported_as="NVFP4", bits=4.5),
    KvCache("nvfp4_affine", "NVFP4_AFFINE_KV_CFG", refused=_NO_ZERO_POINTS),
    KvCache("nvfp4_rotate", "NVFP4_KV_ROTATE_CFG", refused="engines do not rotate keys"),
)

KEYS_AND_VALUES = FormatFamily(
    kv_caches=(KvCache(NO_KV_CACHE, ""), *_KV_CACHES),
    formats=tuple(Format(each.config, kv=each.name) for each in _KV_CACHES),
)
