"""Write the report of a work folder: ``bash report.sh [FOLDER...]``. No torch, and no network.

Inputs:  the manifests (run.json) and reports (JSON) that stages left below the folders.
Outputs: report.html, one page that needs nothing else, and report.md, in the first folder (of an
         output <folder>.report.html, beside it).

    bash report.sh /tmp/megatron_workspace
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from post_training.common import files, manifest, outputs, regular
from post_training.common.errors import UsageError, exit_with_usage_error, suggest
from post_training.reporting import page, writing


def main() -> None:
    try:
        _report(_arguments())
    except UsageError as error:
        exit_with_usage_error(error)


def _report(args: argparse.Namespace) -> None:
    folders = [_folder(each) for each in args.folders or [_work_folder()]]
    target = args.output or _default(folders[0])
    targets = (target, writing.text_of(target))
    _check(targets, overwrite=args.overwrite)
    count = writing.write(folders, target)
    if not count:
        where = ", ".join(map(str, folders))
        cause = "no run.json and no report of a stage lies below it"
        raise UsageError(f"work folder {where}", cause, "name the folder that stages wrote to")
    print(f"report: {targets[0]} (in text: {targets[1].name}), from {count:,} records")


def _work_folder() -> Path:
    default = f"{os.environ.get('TMPDIR') or tempfile.gettempdir()}/megatron_workspace"
    return Path(os.environ.get("MLM_WORK_DIR") or default)


def _default(folder: Path) -> Path:
    """In a work folder; beside an output, which holds what its manifest describes."""
    is_output = (folder / manifest.FILE).is_file()
    return files.sibling(folder, ".report.html") if is_output else folder / "report.html"


def _folder(path: Path) -> Path:
    if not path.exists():
        near = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        remedy = f"{suggest(path.name, near)} name the folder that stages wrote to".strip()
        raise UsageError(f"work folder {path}", "there is no such folder", remedy)
    if not path.is_dir():
        raise UsageError(f"work folder {path}", "it is a file", "name the folder that it lies in")
    if not os.access(path, os.R_OK | os.X_OK):
        raise UsageError(f"work folder {path}", "this user may not read it", "run as its user")
    return path


def _check(targets: Sequence[Path], *, overwrite: bool) -> None:
    """Raise UsageError unless the files can be written, and replace nothing but a report."""
    first = targets[0]
    if first.suffix != ".html":
        raise UsageError(f"--output {first}", "the page is an HTML file", f"--output {first}.html")
    if (first.parent / manifest.FILE).exists():
        cause = f"{first.parent} is the output of a stage, and would hold more than that"
        raise UsageError(f"--output {first}", cause, "name a file elsewhere")
    for path in targets:
        if path.is_dir():
            raise UsageError(f"output {path}", "it is a folder", "name a file in --output")
        outputs.writable(path)
        if path.exists() and not overwrite and not _is_report(path):
            cause = "it exists, and is no report of this program"
            raise UsageError(f"output {path}", cause, "name another file, or give --overwrite")


def _is_report(path: Path) -> bool:
    try:
        return page.GENERATOR in regular.read_text(path)[:2000]
    except (OSError, ValueError):
        return False


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="what stages wrote to (MLM_WORK_DIR, else megatron_workspace in the temporary folder)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (report.html in the first folder)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is no report")
    return parser.parse_args()
