"""What each launch of a run ran on and with: a line in the run folder, for the report and the trackers."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_dist.data.formats import parse_sample_json
from qwenvl_dist.data.index import BadSample
from qwenvl_dist.data.plan import Place
from qwenvl_dist.training.history import JsonLines

if TYPE_CHECKING:
    from qwenvl_dist.data.source import Shards
    from qwenvl_dist.training.state import TrainState

LAUNCHES = "launches.jsonl"
PACKAGES = (
    "qwenvl-dist", "torch", "transformers", "accelerate", "deepspeed", "peft", "webdataset", "safetensors",
    "pillow", "simplejpeg", "swanlab", "tensorboard", "wandb",
)  # fmt: skip


def describe_launch(state: TrainState) -> dict[str, Any]:
    """Return what this launch runs on and with, and from which step. Collective."""
    hosts = Counter(state.host.gather(socket.gethostname()))
    left = state.batches.layout.steps(state.total_samples - state.progress.consumed)
    plugin = state.accelerator.deepspeed_plugin
    assert plugin is not None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": state.progress.step,
        "total_steps": state.progress.step + left,
        "world_size": state.topology.world_size,
        "hosts": dict(hosts),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "grad_accum_steps": state.batches.layout.grad_accum_steps,
        "global_batch_size": state.batches.layout.global_batch_size,
        "zero_stage": state.engine.zero_optimization_stage(),
        "samples_per_epoch": state.identity.samples_per_epoch,
        "validation_samples": state.validation.plan.total_samples if state.validation else None,
        "prompt": first_prompt(state.batches.shards) if state.topology.is_main else None,
        "working_folder": str(Path.cwd()),
        "git_revision": git_revision(),
        "versions": {"python": platform.python_version(), **versions()},
        "deepspeed": _plain(plugin.deepspeed_config),
    }


def _plain(config: Any) -> Any:
    """Return what JSON can hold: no infinity, of which DeepSpeed's configuration has some."""
    return json.loads(json.dumps(config, default=str), parse_constant=lambda _: None)


def record_launch(run: Path, launch: dict[str, Any]) -> None:
    """Add a launch to the run folder. Rank 0 only; raises CheckFailed when the disk does not take it."""
    lines = JsonLines(run / LAUNCHES)
    lines.append(launch)
    lines.close()


def versions() -> dict[str, str]:
    """Return the versions of the packages that shape a result, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the commit of this package's checkout, with `-dirty` for changes on top; None outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # an environment may lie in another's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def first_prompt(shards: Shards) -> str | None:
    """Return what the user says in the first sample, None when that cannot be read."""
    sizes = shards.manifest.shard_sizes
    if not sizes.sum():
        return None
    try:
        raw = shards.read(Place(int(sizes.argmax() if not sizes[0] else 0), 0))
        messages = parse_sample_json(raw.json)["messages"]
    except (BadSample, ValueError):
        return None
    for message in messages:
        if message["role"] == "user":
            return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
    return None
