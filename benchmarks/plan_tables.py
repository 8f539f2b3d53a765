"""The fastest way to share out memory that fits on 1 to 8 GPUs of three sizes: the tables of docs/planning.md.

    python benchmarks/plan_tables.py RECIPE [key.path=value ...] --base BASE [--base BASE ...] --shards DIR

BASE needs no weights, its config.json is enough.
"""

from __future__ import annotations

import argparse

from qwenvl_dist.config import load_recipe
from qwenvl_dist.planning import plan
from qwenvl_dist.planning.estimate import GIB, Choice, Plan

GPUS = (1, 2, 4, 8)
MEMORIES = (24, 40, 80)


def cell(made: Plan) -> str:
    """Return the fastest that fits and what it leaves free, or by how much the smallest does not."""
    if made.fastest is not None:
        spare = made.gpu_memory - made.fastest.memory.peak
        return f"{made.fastest.name}, {spare / GIB:.1f} free"
    least = min((c for c in made.choices if c.can_train), key=lambda choice: choice.memory.peak)
    return f"none: {least.name} lacks {(least.memory.peak - made.gpu_memory) / GIB:.1f}"


def peak(choice: Choice) -> str:
    """Return what it needs on the fullest GPU, and on the host."""
    host = choice.memory.states.host
    return f"{choice.memory.peak / GIB:.1f}" + (f" + {host / GIB:.1f} host" if host >= GIB / 20 else "")


def main() -> None:
    """Print two tables in Markdown for each base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--base", action="append", required=True)
    parser.add_argument("--shards", required=True)
    args = parser.parse_args()
    for base in args.base:
        overrides = [f"model.base={base}", f"data.train={args.shards}", "data.validation=null"]
        recipe = load_recipe(args.recipe, [*overrides, *args.overrides])
        plans = {(n, gib): plan(recipe, n, gpu_memory_gib=gib) for n in GPUS for gib in MEMORIES}
        print(f"\n{base}\n\n| GPUs | " + " | ".join(f"{gib} GiB" for gib in MEMORIES) + " |")
        print("|---|" + "---|" * len(MEMORIES))
        for n in GPUS:
            print(f"| {n} | " + " | ".join(cell(plans[n, gib]) for gib in MEMORIES) + " |")
        print("\n| GiB of the fullest GPU | " + " | ".join(f"{n} GPU" + "s" * (n > 1) for n in GPUS) + " |")
        print("|---|" + "---|" * len(GPUS))
        for number, choice in enumerate(plans[1, MEMORIES[0]].choices):
            row = (peak(plans[n, MEMORIES[0]].choices[number]) for n in GPUS)
            print(f"| {choice.name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
