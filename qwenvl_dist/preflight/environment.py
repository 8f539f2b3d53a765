"""Checks of what each rank runs on and with."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any

from qwenvl_dist.planning.table import describe_bytes
from qwenvl_dist.preflight.checks import Context, Verdict, fail, has_gpu, ok, warn

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from qwenvl_dist.config import Recipe

GIB = 1 << 30
PACKAGE = Path(__file__).resolve().parents[1]
DISTRIBUTION = "qwenvl-dist"
MIN_OPEN_FILES = 1024
CLOCK_WARNS_SECONDS, CLOCK_FAILS_SECONDS = 2.0, 300.0
NVIDIA_DEVICE = Path("/dev/nvidiactl")
SHARED_MEMORY = Path("/dev/shm")
NCCL_BYTES = 33 << 20  # a rank: the segments in NCCL's error messages have 33,030,144 bytes
_PER_NODE = ("data.cache_dir",)  # launch/node.sh sets it


def packages_in_range(context: Context) -> Verdict:
    """Installed versions lie in the ranges of pyproject.toml."""
    shown, wrong = [], []
    for requirement in _requirements():
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found}, must be {requirement.specifier}")
        if requirement.name in ("torch", "transformers", "accelerate", "deepspeed", "peft"):
            shown.append(f"{requirement.name} {found}")
    if wrong:
        return fail(
            "; ".join(wrong), "pip install what is named in the range that is named, or run launch/setup.sh"
        )
    return ok(", ".join(shown))


def _requirements() -> list[Requirement]:
    """Return what this package needs: of the checkout where there is one, else of the installed distribution."""
    from packaging.requirements import Requirement

    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        lines = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = requires(DISTRIBUTION) or []
    parsed = [Requirement(line) for line in lines]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def accelerator(context: Context) -> Verdict:
    """Each rank has a GPU of its own that can do what the recipe asks; or no GPU is there at all."""
    import torch

    if not torch.cuda.is_available():
        if NVIDIA_DEVICE.exists():
            return fail(
                f"the node has NVIDIA GPUs, torch {torch.__version__} cannot use them",
                "install a torch built for CUDA and a driver that is new enough for it",
            )
        return ok(f"no GPU: gloo on {os.cpu_count()} CPUs")
    count, needed = torch.cuda.device_count(), context.topology.local_rank + 1
    if count < needed:
        return fail(
            f"{count} GPUs can be seen, local rank {needed - 1} needs one of its own",
            "start as many processes a node as it has GPUs; look at CUDA_VISIBLE_DEVICES",
        )
    name = torch.cuda.get_device_name(context.topology.local_rank)
    if context.recipe.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    ):
        return fail(
            f"{name} has no bfloat16",
            "set model.dtype=float32, or take GPUs of compute capability 8.0 or newer",
        )
    free, total = torch.cuda.mem_get_info(context.topology.local_rank)
    if free < 0.9 * total:
        return warn(
            f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free before the run",
            "nvidia-smi names who has the rest; a process of an earlier run may be left",
        )
    from torch.cuda import nccl as library

    nccl = ".".join(str(part) for part in library.version())
    return ok(f"{count} x {name}, {total / GIB:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}")


def _same(
    context: Context, look: Callable[[], dict[str, str]], what: str, remedy: str
) -> tuple[Verdict | None, dict[str, str]]:
    """Return the verdict when ranks differ from rank 0, naming what and where, else None; and what rank 0 has."""
    everyone = context.of_all(look)
    main = everyone[0]
    for key in sorted({key for each in everyone for key in each}):
        ranks = [rank for rank, each in enumerate(everyone) if each.get(key) != main.get(key)]
        if ranks:
            other = everyone[ranks[0]].get(key)
            value = f"{what}{key} is {main.get(key)} on rank 0 and {other} on {context.named(ranks)}"
            return fail(value, remedy), main
    return None, main


def same_versions(context: Context) -> Verdict:
    """All ranks run the same versions."""
    remedy = "use one environment on storage that all nodes share, or install alike"
    differs, main = _same(context, _versions, "", remedy)
    return differs or ok(f"{len(main)} packages are alike on all {context.host.world_size} ranks")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for requirement in _requirements():
        try:
            found[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            found[requirement.name] = "missing"
    return found


def same_code(context: Context) -> Verdict:
    """All ranks run the same files of this package."""
    differs, files = _same(context, _hashes, "sha256 of ", "bring all nodes to one checkout")
    whole = hashlib.sha256(repr(files).encode()).hexdigest()[:12]
    return differs or ok(f"{len(files)} files, {whole}")


def _hashes() -> dict[str, str]:
    return {
        str(path.relative_to(PACKAGE.parent)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def same_recipe(context: Context) -> Verdict:
    """All ranks have read the same recipe, except for folders of their own."""
    remedy = "start all nodes with the same recipe and the same key=value words"
    differs, main = _same(context, lambda: _keys(context.recipe), "", remedy)
    return differs or ok(f"{len(main)} keys are alike on all {context.host.world_size} ranks")


def _keys(recipe: Recipe) -> dict[str, str]:
    found = _flat(recipe.to_dict())
    for key in (*_PER_NODE, *(() if recipe.train.output_shared else ("train.output_dir",))):
        found.pop(key, None)
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def clocks(context: Context) -> Verdict:
    """Clocks of all nodes tell the same time."""
    context.host.gather(None)  # so that all look at about the same moment
    times = context.host.gather(time())
    off = [seconds - times[0] for seconds in times]
    rank = max(range(len(off)), key=lambda number: abs(off[number]))
    value = f"{context.named([rank])} is {off[rank]:+.1f} s from rank 0"
    remedy = "let the nodes set their clocks by NTP (chrony)"
    if abs(off[rank]) > CLOCK_FAILS_SECONDS:
        return fail(value, remedy)  # certificates and file times stop making sense
    if abs(off[rank]) > CLOCK_WARNS_SECONDS:
        return warn(value, remedy)
    return ok(f"within {max(map(abs, off)):.2f} s")


def limits(context: Context) -> Verdict:
    """The process may open files and lock memory as it needs to."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    needed = max(MIN_OPEN_FILES, 2 * context.recipe.data.shuffle_window + 512)
    if files != unlimited and files < needed:
        return fail(
            f"{files} open files are allowed, {needed} may be needed",
            f"ulimit -n {needed}, or the node's limits.conf",
        )
    shown = f"open files {'unlimited' if files == unlimited else files}"
    if has_gpu() and len(context.nodes) > 1 and locked != unlimited:
        return warn(
            f"{shown}, locked memory {locked >> 10} KiB",
            "InfiniBand locks memory: ulimit -l unlimited in the job's shell or slurmd's unit (LimitMEMLOCK=infinity)",
        )
    return ok(f"{shown}, locked memory {'unlimited' if locked == unlimited else f'{locked >> 10} KiB'}")


def shared_memory(context: Context) -> Verdict:
    """/dev/shm has room for what the ranks of a node exchange. Loader workers hand batches over elsewhere."""
    if not SHARED_MEMORY.is_dir():
        return ok("this system has no /dev/shm")
    ranks = next(ranks for ranks in context.nodes if context.host.rank in ranks)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if len(ranks) == 1:
        return ok(f"{describe_bytes(free)} free; a rank alone on its node needs none")
    needed = len(ranks) * NCCL_BYTES
    value = f"{describe_bytes(free)} free in {SHARED_MEMORY}, {describe_bytes(needed)} for {len(ranks)} ranks"
    remedy = "mount it larger (docker run --shm-size=8g or --ipc=host)"
    if free < needed:
        return fail(value, remedy)
    if free < 2 * needed:
        return warn(value, remedy)
    return ok(value)


def compiled_ops(context: Context) -> Verdict:
    """What DeepSpeed compiles is compiled, or can be."""
    from qwenvl_dist.distributed import deepspeed_config, prepare_environment

    prepare_environment()
    # Once ranks are joined accelerate looks like a launcher with a configuration of its own.
    plugin = context.accelerator.deepspeed_plugin if context.accelerator else None
    zero = (plugin.deepspeed_config if plugin else deepspeed_config(context.recipe))["zero_optimization"]
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    needed = [] if has_gpu() else ["deepspeed_shm_comm"]
    if device in ("cpu", "nvme"):
        needed.append("cpu_adam")
    if device == "nvme":
        needed.append("async_io")
    if not needed:
        return ok("none is needed")
    folder = _extensions_folder()
    missing = [name for name in needed if not any(folder.rglob(f"{name}.so"))]
    if not missing:
        return ok(f"{', '.join(needed)} in {folder}")
    if "async_io" in missing:
        from deepspeed.ops.op_builder.async_io import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            return fail(
                "async_io cannot be compiled", "install libaio's headers (libaio-dev), or offload to cpu"
            )
    for tool in ("c++", "ninja"):
        if shutil.which(tool) is None:
            return fail(f"{', '.join(missing)} must be compiled, and {tool} is not there", f"install {tool}")
    return warn(
        f"{', '.join(missing)} will be compiled when the run starts, a minute on each node",
        "bash launch/setup.sh compiles on this node; TORCH_EXTENSIONS_DIR names the folder to share",
    )


def _extensions_folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def disk_space(context: Context) -> Verdict:
    """The disk of the run folder holds the checkpoints that the plan counts."""
    place = context.run
    while not place.is_dir():
        place = place.parent
    # What an earlier start has left is rotated away, or is a part of what the plan counts.
    own = sum(path.stat().st_size for path in (context.run / "checkpoints").rglob("*") if path.is_file())
    written = context.checkpoints
    needed = max(0, written.disk_bytes - own)
    free = shutil.disk_usage(place).free
    room, wanted = describe_bytes(free), describe_bytes(needed)
    shown = f"{room} free at {context.run}, {wanted} for {written.on_disk} checkpoints at a time"
    remedy = "free some, choose another train.output_dir, or lower train.keep_checkpoints"
    if free < needed:
        return fail(shown, remedy)
    inodes = os.statvfs(place)
    if inodes.f_files and inodes.f_favail < written.disk_files:
        return fail(f"{inodes.f_favail} inodes free at {context.run}, {written.disk_files} needed", remedy)
    if free < 2 * needed:
        return warn(shown, remedy)
    return ok(shown)
