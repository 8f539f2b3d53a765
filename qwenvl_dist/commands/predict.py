"""qwenvl-dist predict: captions of pictures, before and after when given an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwenvl_dist.commands import generation_options as options


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `predict MODEL IMAGE...`."""
    parser = subparsers.add_parser(
        "predict",
        help="caption pictures, before and after fine-tuning",
        description="Caption pictures with a model; with --adapter show what the base says beside it. "
        "Greedy, so the same every time.",
    )
    parser.add_argument("model", metavar="MODEL", help="a base, a merged model's folder, or a hub id")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", type=Path, help="picture files, or folders of them"
    )
    parser.add_argument("--prompt", help="the user's text (default: 'COCO Yes:')")
    options.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table, or one JSON object."""
    options.check(args)
    from qwenvl_dist.data.formats import DEFAULT_PROMPT
    from qwenvl_dist.evaluate.run import find_pictures, predict

    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    pictures = find_pictures(args.images)
    captioner = options.load(args)
    rows = predict(
        captioner, pictures, prompt, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
    )
    options.print_table(rows, f"{args.model}: {prompt}", args.json)
    if args.json:
        import json

        predictions = [
            {
                "image": row.name,
                "caption": row.after,
                **({} if row.before is None else {"before": row.before}),
            }
            for row in rows
        ]
        print(
            json.dumps(
                {"model": args.model, "prompt": prompt, "predictions": predictions}, ensure_ascii=False
            )
        )
    return 0
