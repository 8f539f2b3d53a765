"""qwenvl-dist train: alone, or on every rank that a launcher starts."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `train RECIPE [key.path=value ...]`."""
    parser = subparsers.add_parser(
        "train",
        help="train a recipe (one process, or under accelerate launch)",
        description="Train a recipe. Started alone it is one process; with several, use "
        "`accelerate launch --config_file launch/accelerate/gpu_zero2.yaml -m qwenvl_dist train RECIPE`. "
        "Started again it goes on where it stopped.",
    )
    parser.add_argument("recipe", help="YAML file; see launch/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="set single keys of the recipe"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print the resolved recipe, start nothing"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; exit code 0 when the plan is done."""
    from qwenvl_dist.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        print(recipe.to_yaml(), end="")
        return 0
    from qwenvl_dist.training.stop import StopSignal

    stop = StopSignal()  # the imports below take seconds, in which a signal may come
    from qwenvl_dist.training.run import run_training

    run_training(recipe, stop)
    return 0
