"""`qwenvl-dist bench`: how fast the parts are, each beside the usual way of doing it, measured in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `bench` with its sub-commands, one function each."""
    bench = subparsers.add_parser(
        "bench",
        help="measure throughput beside the usual ways",
        description="Measure a part of the toolkit and the usual way beside it, in short rounds that take turns.",
    )
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="data")
    _add_data(kinds)


def print_result(report: dict, as_json: bool) -> None:
    """Print the report as the last line of stdout, when asked for."""
    sys.stderr.flush()
    if as_json:
        print(json.dumps(report))


def _add_data(kinds: argparse._SubParsersAction) -> None:
    data = kinds.add_parser(
        "data",
        help="images per second, from JPEG bytes to batches in the training process",
        description="Images per second of each stage of the data stream, and of the hub's processors, of a plain "
        "webdataset pipeline and of Dataset.map on the same samples.",
    )
    data.add_argument("--shards", type=Path, required=True, metavar="DIR", help="a folder of `shards pack`")
    data.add_argument("--base", required=True, help="folder in hub layout, or hub id: its processor is used")
    data.add_argument("--workers", type=int, metavar="N", help="loader processes (default: one a core)")
    data.add_argument("--image-size", default="280", metavar="SIDE|MIN,MAX", help="as in data.image_size")
    data.add_argument("--batch-size", type=int, default=4, metavar="N", help="samples a batch (default: 4)")
    data.add_argument(
        "--seconds", type=float, default=60, metavar="S", help="for all paths together (default: 60)"
    )
    data.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each path (default: 5)")
    data.add_argument(
        "--resize", choices=("fast", "exact"), default="fast", help="as in data.resize (default: fast)"
    )
    data.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    data.set_defaults(run=run_data)


def run_data(args: argparse.Namespace) -> int:
    """Measure the data stream and its rivals."""
    from qwenvl_dist.commands.generation_options import parse_image_size
    from qwenvl_dist.errors import UserError

    for name, least in (("workers", 1), ("batch_size", 1), ("rounds", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds:g}: must be above 0")
    image_size = parse_image_size(args.image_size)

    from qwenvl_dist.bench.data import measure, table
    from qwenvl_dist.data.parallel import available_cores

    report = measure(
        args.shards,
        args.base,
        workers=args.workers or available_cores(),
        image_size=image_size,
        batch_size=args.batch_size,
        seconds=args.seconds,
        rounds=args.rounds,
        exact_resize=args.resize == "exact",
    )
    table(report)
    print_result(report, args.json)
    return 0
