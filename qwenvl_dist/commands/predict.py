"""qwenvl-dist predict: captions of pictures, before and after when given an adapter."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwenvl_dist.commands import generation_options as options
from qwenvl_dist.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `predict MODEL IMAGE...`."""
    parser = subparsers.add_parser(
        "predict",
        help="caption pictures, before and after fine-tuning",
        description="Caption pictures with a model; with --adapter show what the base says beside it. "
        "Greedy, so the same every time.",
    )
    parser.add_argument("model", metavar="MODEL", help="a base, a merged model's folder, or a hub id")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture files, folders of them, or URLs")
    parser.add_argument("--prompt", help="the user's text (default: 'COCO Yes:')")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the JSON object there")
    options.add_to(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table, or one JSON object."""
    options.check(args)
    from qwenvl_dist.data.formats import DEFAULT_PROMPT
    from qwenvl_dist.evaluate.predict import find_pictures, predict

    prompt = DEFAULT_PROMPT if args.prompt is None else args.prompt
    pictures = find_pictures(args.images)
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: its folder does not exist; make it or name another file")
    captioner = options.load(args, args.model, args.adapter)
    rows = predict(
        captioner, pictures, prompt, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
    )
    options.print_table(rows, f"{args.model}: {prompt}", args.json)
    predictions = [
        {"image": row.name, "caption": row.after, **({} if row.before is None else {"before": row.before})}
        for row in rows
    ]
    text = json.dumps({"model": args.model, "prompt": prompt, "predictions": predictions}, ensure_ascii=False)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    return 0
