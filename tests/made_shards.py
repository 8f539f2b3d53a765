"""Small shards written sample by sample, which the packer would not always do, and the stream over them."""

import io
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import webdataset

from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.index import Manifest, ShardEntry, build_shard_index, index_path
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from qwenvl_dist.files import sha256_of
from qwenvl_dist.synthetic.scenes import captions, draw_scene, scene

SIDE = 56
Members = dict[str, bytes]  # by extension


@cache
def jpeg(number: int, side: int = SIDE) -> bytes:
    stream = io.BytesIO()
    draw_scene(scene(number, 0, size=side)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def record(prompt: str, answer: str, images: int = 1) -> bytes:
    content = [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return json.dumps({"messages": messages}).encode()


def scene_members(number: int) -> Members:
    return {"jpg": jpeg(number), "json": record("COCO Yes:", captions(scene(number, 0))[0])}


def key_of(shard: int, sample: int) -> str:
    return f"s{shard:02d}-{sample:02d}"


def write_tar(tar: Path, shard: int, samples: Sequence[Members]) -> None:
    """Write a plain tar as the packer does it; its index and manifest stay what they were."""
    with webdataset.TarWriter(str(tar), user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        for sample, members in enumerate(samples):
            writer.write({"__key__": key_of(shard, sample), **members})


def seal(folder: Path) -> Path:
    """Make the indexes and the manifest agree with the tars that lie there, whatever these hold."""
    entries = []
    for tar in sorted(folder.glob("*.tar")):
        index = build_shard_index(tar)
        index_path(tar).write_bytes(index.to_bytes())
        index_hash = sha256_of(index_path(tar))
        entries.append(ShardEntry(tar.name, index.num_bytes, sha256_of(tar), index_hash, len(index)))
    Manifest(entries).write(folder)
    return folder


def write_shards(folder: Path, shards: Sequence[Sequence[Members]]) -> Path:
    """Pack samples, key `sNN-MM` for sample MM of shard NN; a shard may be empty."""
    folder.mkdir()
    for shard, samples in enumerate(shards):
        write_tar(folder / f"shard-{shard:06d}.tar", shard, samples)
    return seal(folder)


def stream(
    folder: Path,
    encoder: SampleEncoder,
    *,
    layout: StepLayout = StepLayout(1, 3, 2),  # noqa: B008
    rank: int = 0,
    workers: int = 0,
    epochs: int = 1,
    shuffle: bool = True,
    length_grouping: bool = False,
) -> CaptionStream:
    shards = ShardSet(folder)
    plan = RunPlan(shards.manifest.shard_sizes, seed=5, window=2, epochs=epochs, shuffle=shuffle)
    options: Any = {"workers": workers, "timeout_seconds": 60, "length_grouping": length_grouping}
    return CaptionStream(shards, plan, layout, encoder, rank=rank, **options)


def keys_of(steps: Iterator[list[CaptionBatch]]) -> list[str]:
    return [key for step in steps for batch in step for key in batch.keys]
