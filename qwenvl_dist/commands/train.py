"""qwenvl-dist train: alone, or on every rank that a launcher starts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe
    from qwenvl_dist.outcome import Outcome


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
    parser.add_argument(
        "--skip-preflight",
        action="store_true",
        help="leave out the checks that every start makes in a moment",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; exit code 0 when the plan is done. How this rank ended is left for its launcher too."""
    from qwenvl_dist.config import load_recipe

    if args.dry_run:
        print(load_recipe(args.recipe, args.overrides).to_yaml(), end="")
        return 0
    from qwenvl_dist.outcome import Outcome

    outcome = Outcome()
    with outcome.recorded():
        _train(load_recipe(args.recipe, args.overrides), outcome, args.skip_preflight)
    return 0


def _train(recipe: Recipe, outcome: Outcome, skip_preflight: bool) -> None:
    from qwenvl_dist.guard import Guard, Launchers
    from qwenvl_dist.training.stop import StopSignal

    stop = StopSignal()  # the imports below take seconds, in which a signal may come
    guard = Guard(outcome)
    guard.watch(Launchers().gone)
    with guard:
        from qwenvl_dist.preflight.joined import cheap
        from qwenvl_dist.training.run import run_training

        run_training(recipe, stop, guard, joined=None if skip_preflight else cheap)
