"""What a check is, how checks run on all ranks, and how their verdicts become one."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwenvl_dist.data.storage import ReadPolicy, open_storage
from qwenvl_dist.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwenvl_dist.config import Recipe
    from qwenvl_dist.data.source import Shards, ShardSet
    from qwenvl_dist.distributed import HostGroup, Topology
    from qwenvl_dist.model.base_folder import BaseFolder
    from qwenvl_dist.planning import Plan
    from qwenvl_dist.planning.estimate import Checkpoints as PlannedCheckpoints
    from qwenvl_dist.training.state import TrainState


T = TypeVar("T")


class Status(IntEnum):
    """How a check ended, the worst last."""

    OK = 0
    SKIPPED = 1  # what it needs has failed or was not chosen
    WARN = 2
    FAIL = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Verdict:
    """What one rank saw, or all of them together."""

    status: Status
    value: str
    remedy: str = ""


def ok(value: str) -> Verdict:
    """Return that all is well."""
    return Verdict(Status.OK, value)


def warn(value: str, remedy: str) -> Verdict:
    """Return that a run would work, but worse than it could."""
    return Verdict(Status.WARN, value, remedy)


def fail(value: str, remedy: str) -> Verdict:
    """Return that a run would not work."""
    return Verdict(Status.FAIL, value, remedy)


def of_error(error: Exception) -> Verdict:
    """Return the verdict of an error: those of this package end in a remedy."""
    if isinstance(error, UserError | CheckFailed):
        value, _, remedy = str(error).rpartition("; ")
        return fail(value or remedy, remedy if value else "mend what this names")
    if isinstance(error, OSError):
        return fail(
            f"{error.filename or 'a file'}: {error.strerror or error}", "mend the storage that this names"
        )
    return fail(
        f"{type(error).__name__}: {error}", "this is not a mistake in the recipe; report it with this line"
    )


class Found(Exception):  # noqa: N818 (a verdict that ends a check)
    """Ends a check with a verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.value)
        self.verdict = verdict


@dataclass(frozen=True)
class Check:
    """One thing to look for. `name` is its function's."""

    look: Callable[[Context], Verdict]
    group: str
    needs: tuple[str, ...] = ()  # checks that must not have failed
    # Ranks exchange something in it, so that all of them come to the same verdict. Else each looks for itself.
    collective: bool = False
    cheap: bool = False  # `train` makes it too

    @property
    def name(self) -> str:
        """Return what it is called."""
        return self.look.__name__


@dataclass(frozen=True)
class Finding:
    """What a check found over all ranks."""

    name: str
    group: str
    status: Status
    value: str
    remedy: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**vars(self), "status": str(self.status), "seconds": round(self.seconds, 3)}


@dataclass
class Context:
    """What checks look at. What several of them need is made once."""

    recipe: Recipe
    topology: Topology
    host: HostGroup
    accelerator: Accelerator | None = None  # None while only cheap checks run
    sampled_shards: int = 2  # to verify, a rank
    state: TrainState | None = None  # once the model is loaded
    worst_seconds: float = 0.0  # of an optimizer step on the largest micro-batches
    losses: tuple[float, float] | None = None  # of a token, before and after two updates on one batch
    hosts: list[str] = field(init=False)  # of each rank

    def __post_init__(self) -> None:
        self.hosts = self.host.gather(socket.gethostname())

    @property
    def run(self) -> Path:
        """Return the run folder."""
        return Path(self.recipe.train.output_dir)

    @cached_property
    def nodes(self) -> list[list[int]]:
        """Return the ranks of each node, by the order of their first. Ranks of one host are one node."""
        first: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            first.setdefault(host, []).append(rank)
        return list(first.values())

    @cached_property
    def plan(self) -> Plan:
        """Return what the run takes, without a limit of memory."""
        from qwenvl_dist.planning import plan

        gpus = max(len(ranks) for ranks in self.nodes)
        return plan(self.recipe, gpus, self.host.world_size // gpus, on_cpu=not has_gpu())

    @cached_property
    def checkpoints(self) -> PlannedCheckpoints:
        """Return what the run writes, of which the manifests tell enough: no index is read."""
        from qwenvl_dist.data.mixture import samples_per_epoch
        from qwenvl_dist.planning.estimate import checkpoints_of

        held = [part.manifest.samples for part in self.shards.parts]
        return checkpoints_of(
            self.recipe, self.host.world_size, sum(samples_per_epoch(self.recipe.data, held))
        )

    @cached_property
    def shards(self) -> Shards:
        """Return the training data."""
        from qwenvl_dist.data.joined import open_training_sets

        return open_training_sets(self.recipe.data, self.open_shards)

    def open_shards(self, place: str) -> ShardSet:
        """Return the shards at a place, read without a cache."""
        from qwenvl_dist.data.source import ShardSet

        data = self.recipe.data
        return ShardSet(open_storage(place, ReadPolicy(data.read_timeout_seconds, data.read_retries)))

    @cached_property
    def base(self) -> BaseFolder:
        """Return the base. Raises UserError when it is not complete."""
        from qwenvl_dist.model.base_folder import BaseFolder
        from qwenvl_dist.model.load import resolve_base

        return BaseFolder(resolve_base(self.recipe.model.base))

    def of_all(self, look: Callable[[], T]) -> list[T]:
        """Return what `look` gives on each rank. Collective; where it fails on one, the check ends so on all ranks."""
        return self.host.gather(self.of_own(look))

    def of_own(self, look: Callable[[], T]) -> T:
        """Return what `look` gives on this rank. Collective; where it fails on one, the check ends so on all ranks."""
        own: list[T] = []
        verdict = ok("")
        try:
            own.append(look())
        except Found as found:
            verdict = found.verdict
        except Exception as error:
            verdict = of_error(error)
        verdicts = self.host.gather(verdict)
        if any(verdict.status != Status.OK for verdict in verdicts):
            raise Found(merge(self, verdicts))
        return own[0]

    def named(self, ranks: Sequence[int]) -> str:
        """Return how ranks are called, with their hosts."""
        by_host: dict[str, list[str]] = {}
        for rank in ranks:
            by_host.setdefault(self.hosts[rank], []).append(str(rank))
        return ", ".join(f"rank {', '.join(own)} on {host}" for host, own in by_host.items())


def has_gpu() -> bool:
    """Whether torch can use one here."""
    import torch

    return torch.cuda.is_available()


def run(checks: Iterable[Check], context: Context) -> Iterator[Finding]:
    """Make the checks in turn on all ranks, and yield what each found. Collective.

    Whatever goes wrong in a collective check on one rank alone is raised, since the others wait: CheckFailed with the
    check's name.
    """
    bad: dict[str, Status] = {}
    for check in checks:
        unmet = [name for name in check.needs if bad.get(name, Status.OK) in (Status.FAIL, Status.SKIPPED)]
        if unmet:
            bad[check.name] = Status.SKIPPED
            why = f"needs {', '.join(unmet)}"
            yield Finding(check.name, check.group, Status.SKIPPED, why, "", 0.0)
            continue
        began = time.perf_counter()
        found = merge(context, context.host.gather(_verdict(check, context)))
        bad[check.name] = found.status
        yield Finding(
            check.name, check.group, found.status, found.value, found.remedy, time.perf_counter() - began
        )


def _verdict(check: Check, context: Context) -> Verdict:
    try:
        return check.look(context)
    except Found as found:
        return found.verdict
    except (UserError, OSError) as error:
        return of_error(error)
    except CheckFailed as error:
        if check.collective and context.host.world_size > 1:
            raise CheckFailed(f"{check.group} check {check.name}: {error}") from error
        return of_error(error)
    except Exception as error:
        if check.collective and context.host.world_size > 1:
            raise CheckFailed(
                f"{check.group} check {check.name}: {type(error).__name__}: {error}; "
                "the ranks before and after it tell more"
            ) from error
        return of_error(error)


def merge(context: Context, verdicts: list[Verdict]) -> Verdict:
    """Return the worst verdict, with the ranks that came to it where not all did."""
    worst = max(verdicts, key=lambda verdict: verdict.status)
    if worst.status <= Status.SKIPPED or all(verdict == worst for verdict in verdicts):
        return worst
    ranks = [rank for rank, verdict in enumerate(verdicts) if verdict.status == worst.status]
    if len(ranks) == len(verdicts) > 1 and len({verdict.value for verdict in verdicts}) == 1:
        return worst
    alike = [rank for rank in ranks if verdicts[rank].value == worst.value]
    return Verdict(worst.status, f"{context.named(alike)}: {worst.value}", worst.remedy)
