"""qwenvl-dist report: one page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `report RUN [--out FILE.html]`."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page about a run",
        description="Write one HTML page about a run, finished or not: what ran, curves, checkpoints, bad samples, "
        "caption scores, and validation photos with reference, the base's caption and the newest one. Everything is "
        "inside the file.",
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run's output folder")
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="(default: RUN/report.html)")
    parser.add_argument(
        "--photos", metavar="N", type=int, default=24, help="photos on the page at most (default: 24)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from qwenvl_dist.errors import UserError

    if args.photos < 0:
        raise UserError(f"--photos {args.photos}: must be at least 0")
    from qwenvl_dist.report.folder import RunFolder

    found = RunFolder.read(args.folder)
    from qwenvl_dist.report.page import report_page

    out = args.out or args.folder / "report.html"
    page = report_page(found, args.photos)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another file") from error
    print(out)
    return 0
