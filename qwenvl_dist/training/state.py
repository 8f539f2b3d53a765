"""What a checkpoint holds beside the tensors: where the run stands in its data and its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.batch import Adjustment, BadSampleRecord
from qwenvl_dist.data.plan import PLAN_VERSION, SourceProgress
from qwenvl_dist.errors import UserError
from qwenvl_dist.outcome import Outcome
from qwenvl_dist.startup import StartUp
from qwenvl_dist.training.pace import Pace

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwenvl_dist.config import Recipe
    from qwenvl_dist.data.stream import CaptionStream
    from qwenvl_dist.distributed import HostGroup, Topology


@dataclass
class Progress:
    """How far the run is. Equal on all ranks; advanced by finished optimizer steps only."""

    step: int = 0  # optimizer steps done
    consumed: int = 0  # samples of the whole run done, bad ones included
    best_val_loss: float | None = None
    bad_samples: dict[tuple[str, str], str] = field(default_factory=dict)  # (shard, key) -> reason
    adjusted: Counter[str] = field(
        default_factory=Counter
    )  # samples cut, shrunk or dropped, each pass counted

    def advance(self, global_batch_size: int, total_samples: int) -> None:
        """Count one finished optimizer step."""
        self.step += 1
        self.consumed = min(self.consumed + global_batch_size, total_samples)

    def note_bad(self, records: list[BadSampleRecord]) -> list[BadSampleRecord]:
        """Remember bad samples; return those not seen before."""
        fresh = []
        for record in records:
            if (record.shard, record.key) not in self.bad_samples:
                self.bad_samples[record.shard, record.key] = record.reason
                fresh.append(record)
        return fresh


@dataclass(frozen=True)
class SourceIdentity:
    """The same of one data set of a mixture."""

    fingerprint: str
    samples: int  # that it holds
    samples_per_epoch: int  # of the run


@dataclass
class DataIdentity:
    """What makes a position mean the same sample: a resume checks that none of it has changed."""

    fingerprint: str
    seed: int
    shuffle_window: int
    samples_per_epoch: int
    sources: dict[str, SourceIdentity] = field(default_factory=dict)  # of a mixture, by name
    plan_version: int = PLAN_VERSION
    captions: str = "join"  # how a picture's captions are learned

    @property
    def samples(self) -> int:
        """Return how many distinct samples there are."""
        return sum(source.samples for source in self.sources.values()) or self.samples_per_epoch

    def changed_from(self, data: dict[str, Any]) -> str | None:
        """Return the first thing that differs in the data part of a checkpoint's manifest, None where nothing does."""
        data = {"captions": self.captions, "sources": {}, **data}  # checkpoints of before do not have them
        before = data["sources"]
        for name in sorted({*before, *self.sources}):
            if name not in before or name not in self.sources:
                return f"the mixture had {_names(before)} and now has {_names(self.sources)}"
            for key, value in vars(self.sources[name]).items():
                if before[name][key] != value:
                    return f"{key.replace('_', ' ')} of {name} was {before[name][key]} and is now {value}"
        for key, value in vars(self).items():
            if key != "sources" and data[key] != value:
                return f"data {key} was {data[key]} and is now {value}"
        return None


def _names(sources: Collection[str]) -> str:
    return ", ".join(sorted(sources)) or "no sources"


def data_state(
    progress: Progress, identity: DataIdentity, sources: dict[str, SourceProgress] | None = None
) -> dict[str, Any]:
    """Return the data part of a checkpoint's manifest; `sources` is how far each data set of a mixture is."""
    epoch, offset = divmod(progress.consumed, max(1, identity.samples_per_epoch))
    return {
        **vars(identity),
        "sources": {
            name: {**vars(source), "consumed_in_run": (sources or {})[name].samples}
            for name, source in identity.sources.items()
        },
        "epoch": epoch,
        "consumed": offset,
        "consumed_in_run": progress.consumed,
        "bad_samples": [[shard, key, reason] for (shard, key), reason in progress.bad_samples.items()],
        "adjusted": {what.value: progress.adjusted[what] for what in Adjustment},
    }


def restore_progress(manifest: dict[str, Any], identity: DataIdentity, folder: str) -> Progress:
    """Return the progress that a manifest describes. Raises UserError when its data is not this run's data."""
    data = manifest["data"]
    changed = identity.changed_from(data)
    if changed:
        raise UserError(
            f"resume from {folder}: {changed}, so positions name others; "
            "restore the data and recipe of that run, or set train.resume=never with another train.output_dir"
        )
    return Progress(
        step=manifest["step"],
        consumed=data["consumed_in_run"],
        best_val_loss=manifest["progress"]["best_val_loss"],
        bad_samples={(shard, key): reason for shard, key, reason in data["bad_samples"]},
        adjusted=Counter(data.get("adjusted", {})),  # checkpoints of before have no such counts
    )


@dataclass
class TrainState:
    """Everything a training step touches, on one rank."""

    recipe: Recipe
    accelerator: Accelerator
    topology: Topology
    host: HostGroup
    engine: Any  # DeepSpeed's engine around the model
    optimizer: Any
    processor: Any
    batches: CaptionStream
    validation: CaptionStream | None
    identity: DataIdentity
    total_samples: int  # samples after which the run is finished
    progress: Progress = field(default_factory=Progress)
    startup: StartUp = field(default_factory=StartUp)
    outcome: Outcome = field(default_factory=Outcome)
    pace: Pace = field(default_factory=Pace)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.consumed >= self.total_samples
