"""The options that `predict` and `evaluate` share, and how both print. Imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import PixelRange
    from qwenvl_dist.evaluate.captioner import Captioner
    from qwenvl_dist.evaluate.compare import Comparison


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--adapter", metavar="DIR", type=Path, help="peft folder, as `merge --adapter-out` writes it"
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128, help="(default: 128)")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="pictures at a time (default: 8)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on a GPU, else float32)"
    )
    parser.add_argument(
        "--image-size",
        metavar="SIDE|MIN,MAX",
        help="pixels a side, or the least and most pixels of an area with the aspect ratio kept "
        "(default: as in training)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line of stdout"
    )


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a number that makes no sense."""
    for name in ("max_new_tokens", "batch_size", "limit"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if getattr(args, "workers", 0) < 0:
        raise UserError(f"--workers {args.workers}: must be at least 0")
    if args.image_size is not None:
        parse_image_size(args.image_size)


def parse_image_size(text: str) -> int | PixelRange:
    """Return the size that `--image-size` names: `280`, or `3136,1003520`."""
    from pydantic import ValidationError

    from qwenvl_dist.config import DataConfig, PixelRange

    form = f"--image-size {text}: must be a side such as 280, or two areas such as 3136,1003520 (pixels)"
    parts = text.split(",")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise UserError(form) from None
    if len(numbers) > 2:
        raise UserError(form)
    try:
        if len(numbers) == 1:
            return DataConfig(image_size=numbers[0]).image_size
        return PixelRange(min_pixels=numbers[0], max_pixels=numbers[1])
    except ValidationError as error:
        # Of a side, pydantic also reports that it is no range; the first fault is the one that fits.
        rule = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--image-size {text}: {rule}") from None


def load(args: argparse.Namespace, model: str, adapter: Path | None, **more: Any) -> Captioner:
    """Load a model as the arguments say."""
    from qwenvl_dist.evaluate.captioner import load_captioner

    size = None if args.image_size is None else parse_image_size(args.image_size)
    return load_captioner(model, adapter, dtype=args.dtype, image_size=size, **more)


def say(text: str, as_json: bool) -> None:
    """Print a line for people: stdout belongs to the JSON object when one is asked for."""
    print(text, file=sys.stderr if as_json else sys.stdout)


def print_table(rows: Sequence[Comparison], title: str, as_json: bool) -> None:
    """Print captions side by side."""
    from rich.console import Console

    from qwenvl_dist.evaluate.compare import comparison_table

    Console(file=sys.stderr if as_json else sys.stdout).print(comparison_table(rows, title))


def print_numbers(numbers: dict[str, Any], as_json: bool) -> None:
    """Print numbers by name, a line each, or as the JSON object."""
    if as_json:
        sys.stderr.flush()
        print(json.dumps(numbers))
        return
    for name, value in numbers.items():
        if not isinstance(value, list):
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
