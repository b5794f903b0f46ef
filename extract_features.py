"""Run a model over conversations once and store what its draft is trained from.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --finetune-hf-dataset or --finetune-data-files, conversations.
Outputs: --output-dir with train/, valid/ and test/ (98, 1 and 1 %): shards of token ids, answer
         masks, last hidden states and those of the auxiliary layers, with run.json.

Before it starts it says how much disk and time it takes. Started again, it goes on where it was
interrupted: shards that are there are kept.

    HF_MODEL_CKPT=/models/Qwen3-0.6B bash extract_features.sh Qwen/Qwen3-0.6B \\
        --finetune-data-files /data/answers.jsonl --output-dir /data/features
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source
from post_training.common import files, manifest, outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import conversation_data
from post_training.drafts import features as draft_features
from post_training.drafts import options as draft_arguments
from post_training.drafts.record import draft_of
from post_training.models import parallel_check

if TYPE_CHECKING:
    import torch

    from post_training.checkpoints.source import Source
    from post_training.data.packing import PackedConversations
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")

SEQUENCE_LENGTH = 2048
DATASET = "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered"
DATA = ".data"  # packed tokens, removed at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    conversation_data.add_arguments(parser, DATASET)
    add = parser.add_argument_group("extract_features").add_argument
    add("--num-samples", type=int, default=128_000, metavar="N", help="sequences (%(default)s)")
    add("--output-dir", metavar="DIR", help="where the features go")
    add("--shard-size", type=int, default=64, metavar="N", help="sequences a file (%(default)s)")
    add(
        "--micro-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="sequences a rank computes at a time (%(default)s)",
    )
    draft_arguments.add(parser)


def check(args: argparse.Namespace) -> None:
    checks.required(args, "--output-dir", "--output-dir")
    source = find_source(args)
    longest = source.described.max_position_embeddings if source.described else SEQUENCE_LENGTH
    args.seq_length = args.seq_length or min(SEQUENCE_LENGTH, longest)
    for name in ("num_samples", "shard_size", "micro_batch_size", "seq_length"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}", "it is not positive", "1 or more")
    if args.shard_size % args.micro_batch_size:
        raise UsageError(
            f"--shard-size {args.shard_size}",
            f"it is no multiple of --micro-batch-size {args.micro_batch_size}",
            "choose a multiple",
        )
    conversation_data.check(conversation_data.source(args))
    folder = Path(args.output_dir)
    outputs.writable(folder / "settings.json", f"--output-dir {folder}")
    if source.described is not None:
        parallel_check.check(source.described, arguments.parallel(args))
        draft_arguments.plan(args, source.described)
        limit = source.described.max_position_embeddings
        if args.seq_length > limit:
            raise UsageError(
                f"--seq-length {args.seq_length}",
                f"the model's texts have at most {limit} tokens",
                f"--seq-length {limit}",
            )
    if folder.is_dir() and not args.overwrite:
        _check_folder(folder, args, source)


def _check_folder(folder: Path, args: argparse.Namespace, source: Source) -> None:
    """An output folder may be empty, or hold an unfinished extraction with the same settings."""
    content = manifest.read(folder)
    if content is not None:
        raise UsageError(
            f"--output-dir {folder}",
            f"it holds the output of {content.get('stage')}, finished {content.get('finished')}",
            "name another folder, or give --overwrite",
        )
    settings = files.read_json(folder / "settings.json")
    if settings is None and any(folder.iterdir()):
        raise UsageError(
            f"--output-dir {folder}", "it is not empty and no extraction", "name another folder"
        )
    if settings is not None and source.described is not None:
        now = _settings(args, source)
        changed = [n for n in now if now[n] != settings.get(n)]
        if changed:
            raise UsageError(
                f"--output-dir {folder}",
                f"an extraction with another {', '.join(changed)} was begun there",
                "use the same settings, name another folder, or give --overwrite",
            )


def _settings(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What must not change between the runs of one extraction, as JSON."""
    return {
        **draft_features.identity(source, args),
        "sequence_length": args.seq_length,
        "num_samples": args.num_samples,
        "shard_size": args.shard_size,
        "data": conversation_data.source(args).describe(),
        "model": str(Path(source.location).resolve() if source.is_local else source.location),
    }


def extract_features(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Write all shards that are not there yet. Returns the manifest on rank 0.

    Raises:
        UsageError: for data without answers, or a disk without room.
    """
    import torch

    from post_training.common.manifest import Manifest
    from post_training.drafts.eagle3 import attach as eagle

    source = fetch_source(find_source(args), args)
    folder = Path(args.output_dir)
    if session.is_main:
        if args.overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / "settings.json", _settings(args, source))
    torch.distributed.barrier()
    data, content = conversation_data.prepare(
        conversation_data.source(args),
        loading.tokenizer(source, args),
        args.seq_length,
        args.num_samples,
        folder / DATA,
        session.show_progress,
    )
    counts = {part: min(len(data[part]), most) for part, most in _most(args.num_samples).items()}
    logger.info("data: %s", conversation_data.describe(content))
    model = loading.load(source, args, session)
    if draft_of(source) is None:
        # ModelOpt's hooks on the auxiliary layers come with a draft; its weights do not matter.
        eagle.attach(model, draft_arguments.plan(args, source.architecture), args.seed)
    model.eval()
    shards = draft_features.plan_shards(counts, args.shard_size)
    todo = [each for each in shards if not (folder / each.file).exists()]
    _announce(args, session, model, data, folder, len(shards), todo)
    _write(args, session, model, data, folder, todo)
    torch.distributed.barrier()
    fingerprint: list[Any] = [None] * session.world
    torch.distributed.all_gather_object(fingerprint, draft_features.fingerprint(model))
    peak_memory = session.peak_memory()
    if not session.is_main:
        return {}
    shutil.copy(content.pop("prompts"), folder / conversation_data.PROMPTS)
    shutil.rmtree(folder / DATA)
    return Manifest(
        "extract_features",
        source.architecture.to_json(),
        configuration=arguments.explicit(args),
        inputs=source.inputs(),
        metrics={**content, "extracted": sum(counts.values())},
        started=session.started,
        peak_memory_bytes=peak_memory,
        extra={
            "features": {
                **_settings(args, source),
                "fingerprint": next(each for each in fingerprint if each),
                "shards": [{"file": s.file, "sequences": len(s.rows)} for s in shards],
            }
        },
    ).write(folder)


def _most(samples: int) -> dict[str, int]:
    """Most sequences of each part: 98, 1 and 1 % of all, at least one."""
    held_out = max(1, samples // 100)
    return {"train": max(1, samples - 2 * held_out), "valid": held_out, "test": held_out}


def _announce(
    args: argparse.Namespace,
    session: Session,
    model: Any,
    data: dict[str, PackedConversations],
    folder: Path,
    total: int,
    todo: list[draft_features.Shard],
) -> None:
    """Log what is still to do, with the disk and time that it takes; check the disk's room."""
    count = sum(len(shard.rows) for shard in todo)
    if not count:
        logger.info("all %d shards are there already", total)
        return
    states = len(model.eagle_config.eagle_aux_hidden_state_layer_ids)
    per_token = draft_features.bytes_per_token(
        model.config.hidden_size, states, arguments.precision(args)
    )
    needed = count * args.seq_length * per_token
    probe = todo[0].rows[: args.micro_batch_size]
    _features(model, data[todo[0].part], probe, session)  # the first pass also sets things up
    started = time.monotonic()
    _features(model, data[todo[0].part], probe, session)
    seconds = (time.monotonic() - started) / len(probe) * count / session.parallel.data
    logger.info(
        "%d of %d shards to write: %d sequences, %.2f GB on disk (%.1f kB a token), about %s",
        len(todo),
        total,
        count,
        needed / 1e9,
        per_token / 1e3,
        f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} s",
    )
    outputs.disk_space(folder, needed)


def _write(
    args: argparse.Namespace,
    session: Session,
    model: Any,
    data: dict[str, PackedConversations],
    folder: Path,
    todo: list[draft_features.Shard],
) -> None:
    """Shards in turn over the data-parallel ranks; all ranks of a copy of the model take part."""
    from megatron.core import parallel_state
    from tqdm import tqdm

    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    writes = parallel_state.get_tensor_model_parallel_rank() == 0 and model.post_process
    with tqdm(total=len(todo), unit="shard", disable=not session.show_progress) as bar:
        # Every rank makes as many passes: with experts, all of them meet in every layer.
        for first in range(0, len(todo), ranks):
            mine = todo[min(first + rank, len(todo) - 1)]
            parts = [
                _features(model, data[mine.part], rows, session)
                for rows in _groups(mine.rows, args.micro_batch_size)
            ]
            if writes and first + rank < len(todo):
                draft_features.write_shard(folder / mine.file, parts)
            bar.update(min(ranks, len(todo) - first))


def _groups(rows: list[int], size: int) -> Iterator[list[int]]:
    yield from (rows[i : i + size] for i in range(0, len(rows), size))


def _features(
    model: Any, conversations: PackedConversations, rows: list[int], session: Session
) -> dict[str, torch.Tensor] | None:
    """Features of some sequences on the last pipeline stage, None on the others."""
    from post_training.drafts.eagle3 import task as eagle_training

    batch = conversations.batch(rows)
    found = eagle_training.features(model, batch["input_ids"].to(session.device))
    if found is None:
        return None
    hidden, auxiliary = (each.transpose(0, 1).contiguous().cpu() for each in found)
    return {
        "input_ids": batch["input_ids"].int(),
        "loss_mask": batch["loss_mask"],
        "hidden_states": hidden,
        "aux_hidden_states": auxiliary,
    }


def main() -> None:
    args = arguments.parse_namespace("extract_features", add_arguments, check)
    from post_training.cli.stage import open_session
    from post_training.common import report

    with open_session(args) as session:
        content = extract_features(args, session)
        if session.is_main:
            report.summary(
                "features extracted",
                {
                    "sequences": f"{content['metrics']['extracted']:,} x {args.seq_length:,}",
                    "folder": f"{args.output_dir} ({report.size(Path(args.output_dir))})",
                    **report.cost(content),
                },
                next_step=f"bash eagle3.sh <conf> --offline-distillation-data {args.output_dir}",
            )


if __name__ == "__main__":
    main()
