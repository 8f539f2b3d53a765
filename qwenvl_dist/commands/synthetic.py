"""`qwenvl-dist synthetic`: pictures with captions and boxes, pages of text, random bases; for demos and tests."""

import argparse
import json
import sys
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `synthetic scenes` and `synthetic base`."""
    parser = subparsers.add_parser(
        "synthetic",
        help="generate pictures with captions, or a random-weight base",
        description="Generated material for demos and tests: no download, same arguments, same bytes.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    scenes = kinds.add_parser("scenes", help="pictures of two coloured shapes, with COCO captions")
    scenes.add_argument("--out", type=Path, required=True, help="new folder for train/ and validation/")
    scenes.add_argument("--count", type=int, required=True, help="number of training pictures")
    scenes.add_argument(
        "--validation-count",
        type=int,
        default=None,
        help="number of validation pictures (default: an eighth)",
    )
    scenes.add_argument("--seed", type=int, default=0, help="other seeds give other pictures (default: 0)")
    scenes.add_argument("--size", type=int, default=56, help="side of the pictures in pixels (default: 56)")
    scenes.add_argument("--style", default="plain", help="wording of the captions (default: plain)")
    scenes.set_defaults(run=run_scenes)

    pages = kinds.add_parser("pages", help="pictures of text, with COCO captions that are the text")
    pages.add_argument("--out", type=Path, required=True, help="new folder for train/ and validation/")
    pages.add_argument("--count", type=int, required=True, help="number of training pages")
    pages.add_argument(
        "--validation-count", type=int, default=None, help="number of validation pages (default: an eighth)"
    )
    pages.add_argument("--seed", type=int, default=0, help="other seeds give other pages (default: 0)")
    pages.add_argument("--words", type=int, default=40, help="words on a page (default: 40)")
    pages.add_argument("--width", type=int, default=280, help="of a page in pixels (default: 280)")
    pages.add_argument("--height", type=int, default=280, help="of a page in pixels (default: 280)")
    pages.set_defaults(run=run_pages)

    base = kinds.add_parser("base", help="a Qwen2-VL folder with random weights, in hub layout")
    base.add_argument("--out", type=Path, required=True, help="new folder")
    base.add_argument("--shape", required=True, help="scenes, tiny, small, trunc2b, 2b or 7b")
    base.add_argument(
        "--text-files",
        type=Path,
        default=None,
        help="Qwen2-VL's tokenizer files; not for `scenes`",
    )
    base.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    base.set_defaults(run=run_base)


def run_scenes(args: argparse.Namespace) -> int:
    """Write scenes; print the caption files."""
    from qwenvl_dist.synthetic.scenes import write_scenes

    files = write_scenes(args.out, args.count, args.seed, args.size, args.style, args.validation_count)
    for path in files.values():
        print(path)
    return 0


def run_pages(args: argparse.Namespace) -> int:
    """Write pages; print the caption files."""
    from qwenvl_dist.synthetic.pages import write_pages

    files = write_pages(
        args.out, args.count, args.seed, args.words, args.width, args.height, args.validation_count
    )
    for path in files.values():
        print(path)
    return 0


def run_base(args: argparse.Namespace) -> int:
    """Write a base; print its numbers as one JSON line."""
    from qwenvl_dist.synthetic.base import describe, shape_named, write_random_base

    numbers = describe(shape_named(args.shape))
    print(f"writing {numbers['bytes'] / 1e9:.3f} GB in {numbers['tensors']} tensors", file=sys.stderr)
    write_random_base(args.out, args.shape, args.text_files, args.seed)
    print(json.dumps({"out": str(args.out), "shape": args.shape, **numbers}))
    return 0
