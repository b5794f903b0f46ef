"""The flags of an exported folder, shared by the stages that write one. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from post_training.config import checks
from post_training.config.flags import flag


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    export_dir: str | None = flag(
        metavar="FOLDER", help="Hugging Face folder to write; must not exist or be empty"
    )
    max_shard_size: float = flag(
        5.0,
        metavar="GB",
        check=checks.positive,
        help="largest safetensors file, in 10^9 bytes (%(default)s)",
    )

    @property
    def shard_bytes(self) -> int:
        return int(self.max_shard_size * 10**9)
