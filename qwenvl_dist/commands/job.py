"""`job layout`, `job begin`, `job status`, `job end`: what the scripts in slurm/ and launch/ ask."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `job` with its sub-commands."""
    job = subparsers.add_parser("job", help="what the scripts of slurm/ ask about a recipe and a job")
    actions = job.add_subparsers(dest="action", required=True, metavar="layout|begin|status|end")

    layout = actions.add_parser(
        "layout", help="print, for a shell to evaluate, which files and folders a recipe names"
    )
    begin = actions.add_parser(
        "begin", help="note a start of the Slurm job; print, for a shell to evaluate, where it writes"
    )
    begin.add_argument("--nodes", required=True, help="names of the nodes, in the order of their ranks")
    begin.add_argument("--processes-per-node", required=True, type=int, metavar="N")
    for parser in (layout, begin):
        parser.add_argument("recipe", help="YAML file; see launch/recipes/")
        parser.add_argument("overrides", nargs="*", metavar="key.path=value")

    status = actions.add_parser("status", help="print a line for squeue")
    end = actions.add_parser(
        "end",
        help="print `again` when the job should start once more; leave with its exit code: 0 finished, 1 failed, "
        "2 wrong recipe, 75 stopped with everything saved",
    )
    end.add_argument("--code", required=True, type=int, help="exit code of srun")
    end.add_argument("--warned", action="store_true", help="the scheduler had sent its early warning")
    for parser in (status, end):
        parser.add_argument("run_folder", metavar="RUN", type=Path)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command and return the exit code."""
    return {"layout": _run_layout, "begin": _run_begin, "status": _run_status, "end": _run_end}[args.action](
        args
    )


def _assign(**values: str) -> None:
    for name, value in values.items():
        print(f"{name}={shlex.quote(value)}")


def _run_layout(args: argparse.Namespace) -> int:
    from qwenvl_dist.config import load_recipe
    from qwenvl_dist.distributed import deepspeed_config, shipped_deepspeed_config

    recipe = load_recipe(args.recipe, args.overrides)
    size = recipe.data.image_size
    _assign(
        zero_stage=str(deepspeed_config(recipe)["zero_optimization"]["stage"]),
        zero_file=recipe.deepspeed.config or str(shipped_deepspeed_config("zero2.json")),
        timeout_seconds=str(recipe.train.timeout_seconds),
        run=recipe.train.output_dir,
        base=recipe.model.base,
        train_shards=recipe.data.train,
        validation_shards=recipe.data.validation or "",
        image_size=str(size) if isinstance(size, int) else f"{size.min_pixels},{size.max_pixels}",
        resize=recipe.data.resize,
        dtype=recipe.model.dtype,
    )
    return 0


def _run_begin(args: argparse.Namespace) -> int:
    from qwenvl_dist.config import load_recipe
    from qwenvl_dist.jobs import Job, JobHistory, Limits

    Limits.from_environment(os.environ)  # a wrong one comes up now, not when the job has run for a day
    recipe = load_recipe(args.recipe, args.overrides)
    nodes = args.nodes.split()
    recipe.grad_accum_steps(len(nodes) * args.processes_per_node)
    history = JobHistory.load(Path(recipe.train.output_dir), Job.from_environment(os.environ))
    more = history.begin(nodes, args.processes_per_node)
    start = history.starts[-1]
    _assign(run=str(history.run), logs=str(history.logs), outcomes=str(history.outcomes), more=" ".join(more))
    print(
        f"job {history.job.id}, start {len(history.starts)}: {start.world_size} ranks on {', '.join(start.nodes)}, "
        f"logs {history.logs}.*.log",
        file=sys.stderr,
    )
    return 0


def _run_status(args: argparse.Namespace) -> int:
    from qwenvl_dist.jobs import Job, JobHistory, status

    history = JobHistory.load(args.run_folder, Job.from_environment(os.environ))
    print(status(args.run_folder, history.starts[-1], len(history.starts)))
    return 0


def _run_end(args: argparse.Namespace) -> int:
    from qwenvl_dist.jobs import Job, JobHistory, Limits

    history = JobHistory.load(args.run_folder, Job.from_environment(os.environ))
    verdict = history.end(args.code, args.warned, Limits.from_environment(os.environ))
    if verdict.again:
        print("again")
    print("\n".join(verdict.lines), file=sys.stderr)
    return verdict.code
