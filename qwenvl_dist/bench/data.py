"""Pictures per second of the data stream, stage by stage, and of the usual ways on the same samples.

Every path is an iterator that says how many pictures each item brought. The paths take turns in short rounds and the
median of each counts, so that a machine that gets slower gets slower for all.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from qwenvl_dist.bench import rivals
from qwenvl_dist.data.images import decode
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from qwenvl_dist.errors import UserError
from qwenvl_dist.logs import get_logger, progress
from qwenvl_dist.model.load import load_processor, resolve_base

if TYPE_CHECKING:
    from qwenvl_dist.config import PixelRange

log = get_logger(__name__)

SAMPLES_IN_MEMORY = 512
PREFETCH = 2  # batches a worker keeps ready: DataLoader's default, and the stream's without accumulation


@dataclass
class Lane:
    """One path under measurement."""

    counts: Iterator[int]  # pictures of each item
    ready: int = 0  # items that may have been made between its turns
    rates: list[float] = field(default_factory=list)  # pictures per second, a round each

    def take_turn(self, seconds: float) -> None:
        """Measure for `seconds`, once what was made beforehand is used up."""
        waiting = sum(next(self.counts) for _ in range(self.ready))
        started, pictures = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < seconds:
            pictures += next(self.counts)
        self.rates.append(pictures / passed)
        time.sleep(min(waiting / max(self.rates[-1], 1e-9), 2.0))  # its workers fill their queues, then rest

    @property
    def per_second(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)


class _DecodeOnly(IterableDataset):
    """Workers that decode and send nothing but counts: no way of doing the work can be faster."""

    def __init__(self, samples: Sequence[RawSample], batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        counts = _in_process(
            _decode, self.samples[worker.id :: worker.num_workers] if worker else self.samples
        )
        while True:
            yield sum(next(counts) for _ in range(self.batch_size))


def _in_process(work: Callable[[RawSample], object], samples: Sequence[RawSample]) -> Iterator[int]:
    for raw in cycle(samples):
        work(raw)
        yield len(raw.images)


def _decode(raw: RawSample) -> None:
    for data in raw.images:
        decode(data)


def _through_the_stream(
    shards: ShardSet, encoder: SampleEncoder, batch_size: int, workers: int
) -> Iterator[int]:
    plan = RunPlan(shards.manifest.shard_sizes, seed=0, window=64, epochs=1_000_000)
    stream = CaptionStream(shards, plan, StepLayout(1, batch_size, 1), encoder, rank=0, workers=workers)
    for (batch,) in stream.iterate():
        yield len(batch.grids)


def measure(
    shards_folder: Path,
    base: str,
    *,
    workers: int,
    image_size: int | PixelRange = 280,
    batch_size: int = 4,
    seconds: float = 60,
    rounds: int = 5,
    exact_resize: bool = False,
) -> dict[str, Any]:
    """Return the report: `*_per_second` of each path, the stream's ratios to the others, the workers' memory."""
    folder = resolve_base(base)
    processor = load_processor(folder)
    rule = ImageSizeRule.of(image_size, processor, "--image-size")
    encoder = SampleEncoder(processor, rule, 8192, exact_resize)
    shards = ShardSet(shards_folder)
    shards.require_pictures()
    samples = _load(shards)
    if workers > len(samples):
        raise UserError(
            f"--workers {workers}: {shards_folder} has only {len(samples)} samples with a picture"
        )

    paths = [shards_folder / entry.name for entry in shards.manifest.shards if entry.samples]
    fast = rivals.hub_processor(folder, rule, "torchvision")
    slow = rivals.hub_processor(folder, rule, "pil")
    ready = PREFETCH * workers
    decode_many = DataLoader(_DecodeOnly(samples, batch_size), batch_size=None, num_workers=workers)
    lanes = {
        "decode": Lane(_in_process(_decode, samples)),
        "decode_resize": Lane(_in_process(lambda raw: [encoder.picture(p) for p in raw.images], samples)),
        "sample": Lane(_in_process(encoder.encode, samples)),
        "decode_workers": Lane(iter(decode_many), ready),
        "loader": Lane(_through_the_stream(shards, encoder, batch_size, workers), ready),
        "hub_fast": Lane(rivals.hub_in_workers(samples, fast, batch_size, workers), ready),
        "hub_pil": Lane(rivals.hub_in_workers(samples, slow, batch_size, workers), ready),
        "plain_webdataset": Lane(rivals.plain_webdataset(paths, fast, batch_size, workers), ready),
        "dataset_map": Lane(rivals.dataset_map(samples, fast, rule.side)),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        memory = _take_turns(lanes, rounds, seconds / (rounds * len(lanes)))
    finally:
        torch.set_num_threads(threads)
    return _report(lanes, workers) | memory | {
        "workers": workers, "batch_size": batch_size, "image_size": str(image_size), "rounds": rounds,
        "resize": "exact" if exact_resize else "fast", "samples_in_memory": len(samples),
    }  # fmt: skip


def _load(shards: ShardSet) -> list[RawSample]:
    """Return samples with a picture, spread over the data set."""
    plan = RunPlan(shards.manifest.shard_sizes, seed=0, window=len(shards.manifest.shards))
    places = plan.locate(0, min(plan.total_samples, SAMPLES_IN_MEMORY))
    samples = [raw for raw in (shards.read(place) for place in places if place is not None) if raw.images]
    if not samples:
        raise UserError(
            f"--shards {shards.storage.location}: no sample with a picture among them; pack some first"
        )
    return samples


def _take_turns(lanes: dict[str, Lane], rounds: int, seconds: float) -> dict[str, Any]:
    """Run all rounds; return the memory of the stream's workers after their first round and at the end."""
    before: dict[str, Any] = {}
    workers: list[int] = []
    with progress(total=rounds * len(lanes), description="bench data") as bar:
        for _ in range(rounds):
            for name, lane in list(lanes.items()):
                children = {child.pid for child in multiprocessing.active_children()}
                try:
                    lane.take_turn(seconds)
                except UserError as error:
                    log.warning("%s is left out: %s", name, error)
                    del lanes[name]
                if name == "loader" and not workers:
                    workers = [
                        c.pid for c in multiprocessing.active_children() if c.pid and c.pid not in children
                    ]
                    before = {"worker_peak_rss_mib_first_round": _peak_rss_mib(workers)}
                bar.advance()
    return before | {"worker_peak_rss_mib": _peak_rss_mib(workers)}


def _peak_rss_mib(processes: Sequence[int]) -> list[float] | None:
    """Return the peak resident memory of each process so far; None where there is no /proc."""
    try:
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in processes]
    except OSError:
        return None
    return [round(int(text.split("VmHWM:")[1].split()[0]) / 1024, 1) for text in texts]


PATHS = {  # in the order of the table
    "decode": "decode only, one process",
    "decode_resize": "decode and resize, one process",
    "sample": "whole sample, one process",
    "decode_workers": "decode only, in the workers",
    "loader": "the data stream, to the training process",
    "hub_fast": "hub, torchvision processor, in the workers",
    "hub_pil": "hub, PIL processor, in the workers",
    "plain_webdataset": "plain webdataset, torchvision processor",
    "dataset_map": "Dataset.map, one process",
}


def _report(lanes: dict[str, Lane], workers: int) -> dict[str, Any]:
    """Return the medians, None for a path that was left out, and the stream's ratios to them."""
    rates = {name: lanes[name].per_second if name in lanes else None for name in PATHS}
    stream = lanes["loader"].per_second

    def ratio(name: str, share: float = 1) -> float | None:
        rate = rates[name]
        return round(share * stream / rate, 3) if rate else None

    mapped = rates["dataset_map"]
    one_process = round(lanes["sample"].per_second / mapped, 3) if mapped and "sample" in lanes else None
    return {f"{name}_per_second": rate and round(rate, 1) for name, rate in rates.items()} | {
        "share_of_decode": ratio("decode_workers"),
        "ratio_to_hub_fast": ratio("hub_fast"),
        "ratio_to_hub_pil": ratio("hub_pil"),
        "ratio_to_plain_webdataset": ratio("plain_webdataset"),
        "ratio_to_dataset_map_per_core": ratio(
            "dataset_map", 1 / workers
        ),  # the stream's rate shared by its workers
        "sample_ratio_to_dataset_map": one_process,
    }


def table(report: dict[str, Any]) -> None:
    """Print the report for a person, on stderr."""
    from rich.console import Console
    from rich.table import Table

    rows = Table(title=f"{report['workers']} workers, batches of {report['batch_size']}, median of rounds")
    rows.add_column("path")
    rows.add_column("images/s", justify="right")
    rows.add_column("the stream is", justify="right")
    for name, label in PATHS.items():
        rate = report[f"{name}_per_second"]
        times = f"{report['loader_per_second'] / rate:.2f} x" if rate else ""
        rows.add_row(label, f"{rate:.0f}" if rate else "not measured", times)
    console = Console(stderr=True)
    console.print(rows)
    memory = report["worker_peak_rss_mib"]
    if memory is not None:
        first = report["worker_peak_rss_mib_first_round"]
        console.print(
            f"peak memory of the stream's workers, MiB: {first} after the first round, {memory} at the end"
        )
