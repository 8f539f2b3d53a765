"""A context without processes: other ranks say what a test lets them say."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenvl_dist.distributed import Topology
from qwenvl_dist.preflight.checks import Check, Context, Finding, run
from qwenvl_dist.preflight.registry import CHECKS
from tests.planning.test_plan import recipe_of


class FakeHost:
    """Ranks of which only rank 0 is there; `others` tells what rank 1 has where rank 0 has a value."""

    def __init__(self, world_size: int = 1, others: Callable[[Any], Any] = lambda value: value) -> None:
        self.rank, self.world_size, self.others = 0, world_size, others

    def gather(self, value: Any) -> list[Any]:
        return [value, *(self.others(copy.deepcopy(value)) for _ in range(1, self.world_size))]

    def from_main(self, value: Any) -> Any:
        return value

    def barrier(self) -> None: ...

    def sum(self, *values: int) -> tuple[int, ...]:
        return tuple(value * self.world_size for value in values)


def context_of(
    base: Path, shards: Path, run: Path, host: FakeHost | None = None, local_rank: int = 0, **sections: Any
) -> Context:
    """Return what checks look at, of a recipe with these sections."""
    host = host or FakeHost()
    train = {"output_dir": str(run), **sections.pop("train", {})}
    recipe = recipe_of(base, shards, train=train, tracking={"mode": "disabled"}, **sections)
    fake: Any = host
    return Context(recipe, Topology(0, local_rank, 0, host.world_size), fake)


def find(name: str, context: Context) -> Finding:
    """Make one check alone."""
    check = next(check for check in CHECKS if check.name == name)
    (finding,) = run([Check(check.look, check.group, (), check.collective)], context)
    return finding


def assert_found(finding: Finding, status: str, value: str, remedy: str) -> None:
    """Insist on what a check saw and said."""
    assert str(finding.status) == status, finding
    assert value in finding.value, finding.value
    assert remedy in finding.remedy, finding.remedy
