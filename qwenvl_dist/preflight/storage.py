"""Checks of the places that a run writes to."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from qwenvl_dist.errors import UserError
from qwenvl_dist.files import fsync
from qwenvl_dist.preflight.checks import Context, Verdict, fail, ok, warn

GIB = 1 << 30
MIB = 1 << 20
WRITE_BYTES = 64 * MIB
SLOW_CHECKPOINT_SECONDS = 60.0


def output_folder(context: Context) -> Verdict:
    """Every rank writes the run folder and sees there what rank 0 writes, where the recipe says that it is shared."""
    from qwenvl_dist.training.output_folder import ranks_elsewhere

    elsewhere = ranks_elsewhere(context.run, context.host, context.recipe.train.output_shared)
    if elsewhere:
        return ok(f"{context.run}: {context.named(elsewhere)} have their own; rank 0 gathers checkpoints")
    return ok(f"{context.run}: all {context.host.world_size} ranks write there and see rank 0's files")


def atomic_files(context: Context) -> Verdict:
    """The file system of the run folder has what a checkpoint needs to be whole or absent."""
    if not _writes(context):
        return ok("rank 0 looks")
    folder = _scratch(context)
    did = "make a folder"
    try:
        folder.mkdir(parents=True)
        did = "write and fsync a file"
        first, second = folder / "first", folder / "second"
        for path in (first, second):
            path.write_bytes(path.name.encode())
            fsync(path)
        did = "rename a file over another"
        first.replace(second)
        if second.read_bytes() != b"first" or first.exists():
            return fail(f"{context.run}: a rename over a file did not replace it", "use a POSIX file system")
        did = "rename a folder that is not empty"
        (folder / "partial").mkdir()
        (folder / "partial" / "file").touch()
        (folder / "partial").rename(folder / "whole")
        did = "make a symbolic link, which checkpoints/best is"
        (folder / "best").symlink_to("whole")
        (folder / "best" / "file").stat()
        did = "fsync a folder"
        fsync(folder)
    except OSError as error:
        return fail(
            f"{context.run}: cannot {did} ({error.strerror or error})",
            "choose a train.output_dir on a POSIX file system with room (not an object store's mount)",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ok(f"{context.run}: rename, fsync and symbolic links work")


def write_speed(context: Context) -> Verdict:
    """A checkpoint is written in reasonable time."""
    if not _writes(context):
        return ok("rank 0 looks")
    size = context.checkpoints.bytes
    folder = _scratch(context)
    try:
        folder.mkdir(parents=True)
        block = os.urandom(MIB)
        began = time.perf_counter()
        with (folder / "speed").open("wb") as file:
            for _ in range(WRITE_BYTES // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rate = WRITE_BYTES / (time.perf_counter() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shown = f"{rate / 1e6:.0f} MB/s: a checkpoint of {size / MIB:.0f} MiB takes {size / rate:.1f} s"
    if size / rate > SLOW_CHECKPOINT_SECONDS:
        return warn(
            shown,
            "set train.checkpoint_async=true, raise train.checkpoint_every_steps, or write to faster storage",
        )
    return ok(shown)


def node_cache(context: Context) -> Verdict:
    """data.cache_dir, if there is one, can be written on each node and has room for two windows of shards."""
    data = context.recipe.data
    if data.cache_dir is None:
        return ok("no data.cache_dir: shards are read where they are")
    from qwenvl_dist.data.cache import ShardCache

    folder = Path(data.cache_dir)
    ShardCache(folder, 0).prepare()
    window: list[int] = []
    for part in context.shards.parts:  # each data set has its own windows
        sizes = sorted((shard.num_bytes for shard in part.manifest.shards), reverse=True)
        window += sizes[: 2 * data.shuffle_window]
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    room = min(int(data.cache_gib * GIB), shutil.disk_usage(folder).free + held)
    shown = f"{folder}: room for {room / GIB:.1f} GiB, two windows of shards are {sum(window) / GIB:.2f} GiB"
    if room < sum(window):
        return warn(
            shown,
            "what does not fit is read in parts: free space, raise data.cache_gib, or lower data.shuffle_window",
        )
    return ok(shown)


def _writes(context: Context) -> bool:
    """Whether this rank writes into the run folder by itself."""
    return context.topology.is_main


def _scratch(context: Context) -> Path:
    try:
        context.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"train.output_dir = {context.run}: cannot be made ({error.strerror}); choose another folder"
        ) from error
    return context.run / f".preflight-{uuid.uuid4().hex}"
