"""Checks on joined ranks: all of them before a run, and the cheap ones as a run starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_dist.distributed import HostGroup, Topology, start
from qwenvl_dist.errors import UserError
from qwenvl_dist.guard import Guard
from qwenvl_dist.heartbeat import Heartbeat, collective_seconds
from qwenvl_dist.logs import get_logger
from qwenvl_dist.preflight.checks import Check, Context, Finding, Status, run
from qwenvl_dist.preflight.registry import CHEAP

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe

log = get_logger(__name__)
SKIP_FLAG = "--skip-preflight"


def on_all_ranks(
    recipe: Recipe, checks: Sequence[Check], sampled_shards: int, guard: Guard
) -> Iterator[Finding]:
    """Join the other ranks as a run does, make the checks and yield what each found. Collective."""
    run_folder = Path(recipe.train.output_dir)
    was_there = run_folder.exists()
    accelerator = start(recipe)
    host = HostGroup(collective_seconds(recipe.train.timeout_seconds))
    with Heartbeat(host, guard, recipe.train.timeout_seconds):
        context = Context(recipe, Topology.from_environment(), host, accelerator, sampled_shards)
        yield from run(checks, context)
        if not was_there:
            with contextlib.suppress(OSError):  # another rank's, or something is left in it
                run_folder.rmdir()
    accelerator.end_training()


def cheap(recipe: Recipe, host: HostGroup) -> None:
    """Make the checks that take no time, as a run starts. Collective. Warnings are logged; UserError for what fails."""
    failed: list[Finding] = []
    for finding in run(CHEAP, Context(recipe, Topology.from_environment(), host)):
        if finding.status == Status.FAIL:
            failed.append(finding)
        elif finding.status == Status.WARN:
            log.warning("preflight check %s: %s; %s", finding.name, finding.value, finding.remedy)
    if failed:
        first = failed[0]
        more = f" (and {', '.join(f.name for f in failed[1:])})" if len(failed) > 1 else ""
        raise UserError(
            f"preflight check {first.name}{more}: {first.value}; {first.remedy}; {SKIP_FLAG} trains all the same"
        )
