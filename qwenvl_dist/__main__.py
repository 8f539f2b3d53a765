"""The command line: parse, call, turn errors into one line and an exit code. Imports nothing heavy."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.leaving import run_and_leave
from qwenvl_dist.logs import place
from qwenvl_dist.outcome import Outcome, reason_of

COMMANDS = (
    "shards",
    "plan",
    "preflight",
    "train",
    "merge",
    "predict",
    "evaluate",
    "report",
    "bench",
    "synthetic",
    "job",
    "download",
)

_MOMENT = 1.0  # seconds


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="qwenvl-dist",
        description="Distributed fine-tuning of Qwen2-VL: pack shards, train, merge, look at the result.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"qwenvl_dist.commands.{name}").add_parser(subparsers)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    if hasattr(
        args, "overrides"
    ):  # argparse takes no positional after an option: `train RECIPE --dry-run key=value`
        args.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _end(message: str, code: int, alike: bool = True) -> NoReturn:
    """Print one line and leave. Among several ranks at once: the others must not wait for our clean-up.

    An error that all ranks meet alike is left to rank 0: a launcher ends the others as soon as one has gone. Who is
    still there after a moment was alone with it.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if alike and world_size > 1 and rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_MOMENT)
    prefix = f"[{place()}] " if world_size > 1 else ""
    print(f"{prefix}error: {message}", file=sys.stderr, flush=True)
    if world_size > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 the work failed or a check found faults, 2 the command line or recipe is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parse(words)
    except SystemExit as left:
        if left.code == 2 and words[:1] == ["train"]:
            Outcome().write("usage", f"the command line is wrong: {' '.join(words)}")
        raise
    try:
        return args.run(args)
    except UserError as error:
        _end(str(error), 2)
    except CheckFailed as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        _end("interrupted", 1)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        traceback.print_exc()
        _end(reason_of(error), 1, alike=False)


def run() -> NoReturn:
    """Run the command of this process's command line and end the process."""
    run_and_leave(main)


if __name__ == "__main__":
    run()
