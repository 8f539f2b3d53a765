"""The options of `shards pack --source grounding`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.formats import DEFAULT_JOIN, DEFAULT_PROMPT
from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.data.formats import SampleReader

TASKS = ("name_to_boxes", "all_objects", "both")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--instances", metavar="FILE", help="COCO instances JSON, a file or URL, for --source grounding"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="with --source grounding: ask for the boxes of a name, for all objects, or both (default: both)",
    )


def refuse(args: argparse.Namespace) -> None:
    """Raise UserError when another source got these options, or lacks its own."""
    for name in ("instances", "task"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --source grounding, not with {args.source}")
    if args.input is None:
        option = "--captions" if args.source == "coco" else "--input"
        raise UserError(f"{option} is missing: --source {args.source} reads its annotations from there")


def read(args: argparse.Namespace) -> tuple[SampleReader, dict[str, Any]]:
    """Return the samples of an input, and what the manifest is to say of how they were made.

    Looks at the whole input, and logs what is left out.
    """
    from qwenvl_dist.data.grounding import ALL_PROMPT, FIND_PROMPT, read_coco_instances
    from qwenvl_dist.logs import get_logger

    if args.instances is None:
        raise UserError("--instances is missing: --source grounding reads its boxes from there")
    if args.images is None:
        raise UserError("--images is missing: --source grounding finds its pictures there")
    if args.input is not None:
        raise UserError("--captions does not go with --source grounding, which reads --instances")
    for option, is_given in (
        ("--join", args.join != DEFAULT_JOIN),
        ("--captions-mode", args.captions_mode is not None),
        ("--keep-white-space", args.keep_white_space),
        ("--image-column", args.image_column is not None),
        ("--text-column", args.text_column is not None),
        ("--split", args.split is not None),
    ):
        if is_given:
            raise UserError(f"{option} does not go with --source grounding, whose answers are boxes; drop it")
    task = args.task or "both"
    find_prompt, all_prompt = FIND_PROMPT, ALL_PROMPT
    if args.prompt != DEFAULT_PROMPT:
        if task == "both":
            raise UserError(
                f"--prompt {args.prompt!r}: two tasks have two prompts; pack them apart, with --task"
            )
        find_prompt, all_prompt = (
            (args.prompt, ALL_PROMPT) if task == "name_to_boxes" else (FIND_PROMPT, args.prompt)
        )
    reader = read_coco_instances(
        args.instances,
        args.images,
        task,
        find_prompt=find_prompt,
        all_prompt=all_prompt,
        allow_missing=args.skip_bad,
    )
    for what, count in reader.left_out.items():
        get_logger(__name__).info("left out: %d %s", count, what)
    prompts = {"find_prompt": find_prompt, "all_prompt": all_prompt}
    used = {name: text for name, text in prompts.items() if task in ("both", _TASK_OF[name])}
    return reader, {"source": "grounding", "task": task, **used, "left_out": reader.left_out}


_TASK_OF = {"find_prompt": "name_to_boxes", "all_prompt": "all_objects"}
