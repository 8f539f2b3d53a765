"""qwenvl-dist evaluate: loss and captions of a model over packed shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwenvl_dist.commands import generation_options as options

ROWS_SHOWN = 8


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `evaluate MODEL --shards DIR --out DIR`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="loss and captions over packed shards",
        description="Measure a model on packed shards: mean token loss, captions, the share that equals the "
        "reference. Writes predictions.json (COCO results format), evaluation.json and comparison.html; with "
        "--adapter also the base's numbers and predictions_base.json.",
    )
    parser.add_argument("model", metavar="MODEL", help="a base, a merged model's folder, or a hub id")
    parser.add_argument(
        "--shards", metavar="DIR", required=True, help="a folder that `shards pack` wrote, or a URL"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for the results")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N samples")
    parser.add_argument("--workers", metavar="N", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=int,
        default=8192,
        help="tokens a sample may have, for the loss (default: 8192)",
    )
    options.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table of the first samples and the numbers, or one JSON object."""
    options.check(args)
    from qwenvl_dist.data.index import Manifest
    from qwenvl_dist.errors import UserError
    from qwenvl_dist.evaluate.run import PAGE, evaluate

    Manifest.load(args.shards)  # its faults come up before the model is loaded
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {args.out}: cannot be made ({error.strerror}); name another folder"
        ) from error
    numbers, rows = evaluate(
        options.load(args, max_length=args.max_length),
        args.shards,
        args.out,
        title=args.model if args.adapter is None else f"{args.model}, before and after {args.adapter}",
        limit=args.limit,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        workers=args.workers,
    )
    options.print_table(rows[:ROWS_SHOWN], str(args.shards), args.json)
    options.print_numbers(numbers, args.json)
    options.say(f"all of it, with pictures: {args.out / PAGE}", args.json)
    return 0
