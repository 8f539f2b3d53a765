"""`qwenvl-dist plan`: what a run will take, before anything starts."""

from __future__ import annotations

import argparse
import json

DEFAULT_MEMORY_GIB = 80.0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `plan RECIPE [key.path=value ...]`."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, steps, checkpoint size and days of a run, from config.json and the data's manifest",
        description="Tell what a run takes, from the base's config.json and the data's manifest and indexes alone: "
        "memory of the fullest GPU under each way of sharing it out, steps, arithmetic, checkpoints, advice.",
    )
    parser.add_argument("recipe", help="YAML file; see launch/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="set single keys of the recipe"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of each node (default: 1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="(default: 1)")
    parser.add_argument(
        "--gpu-memory", type=float, default=DEFAULT_MEMORY_GIB, metavar="GIB",
        help="of one GPU (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu",
        default="A100-SXM4-80GB",
        metavar="NAME",
        help="whose published peak counts (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="of that peak, assumed (default: %(default)g)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on the last line of stdout"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit code 0 whether it fits or not."""
    from qwenvl_dist.config import load_recipe
    from qwenvl_dist.errors import UserError

    for name in ("gpus", "nodes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 < args.gpu_memory < float("inf"):
        raise UserError(f"--gpu-memory {args.gpu_memory:g}: must be GiB above 0, such as 80")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: must be above 0 and at most 1, such as 0.4")
    recipe = load_recipe(args.recipe, args.overrides)

    from qwenvl_dist.planning import plan
    from qwenvl_dist.planning.table import text, to_json

    made = plan(recipe, args.gpus, args.nodes, args.gpu_memory, args.mfu, args.gpu)
    print(json.dumps(to_json(made)) if args.json else text(made))
    return 0
