"""Real training runs in real processes, small enough for a test: how they are started and what they left behind."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from tests.ranks import run_ranks

TIMEOUT = 240  # seconds for a whole run: some 15 s on a quiet machine
# Small enough that ZeRO-3 really partitions some adapter tensors and keeps others whole.
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000, "overlap_comm": True}}
ZERO2 = {"zero_optimization": {"stage": 2, "contiguous_gradients": True}}


def write_recipe(path: Path, base: Path, shards: Path, out: Path, stage: int = 2, **sections: Any) -> Path:
    """Write a float32 recipe of six steps of eight samples, with a ledger; `sections` are merged over it."""
    zero = path.with_name(f"{path.stem}-zero{stage}.json")
    zero.write_text(json.dumps(ZERO3 if stage == 3 else ZERO2))
    recipe: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"dropout": 0.1},
        "data": {"train": str(shards), "image_size": 56, "micro_batch_size": 2, "workers": 1, "ledger": True},
        "optim": {"learning_rate": 5e-3},
        "train": {
            "max_steps": 6,
            "grad_accum_steps": 4,
            "log_every_steps": 1,
            "checkpoint_every_steps": 3,
            "timeout_seconds": 200,
            "output_dir": str(out),
        },
        "deepspeed": {"config": str(zero)},
        "tracking": {"mode": "disabled"},
    }
    for name, section in sections.items():
        if isinstance(section, dict) and isinstance(recipe.get(name), dict):
            recipe[name].update(section)
        else:
            recipe[name] = section
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(recipe: Path, world: int, **options: Any) -> list[str]:
    """Run `qwenvl-dist train` on `world` ranks to its end; every rank's stderr is shown when one fails."""
    return run_ranks("tests.training.runs:run_train", world, timeout=TIMEOUT, recipe=str(recipe), **options)


def run_train(recipe: str, kill_at_step: int | None = None, kill_rank: int = 0, **signals: Any) -> None:
    """One rank: train, and when told so die or get a signal once a step has been logged."""
    from qwenvl_dist.__main__ import main

    out = Path(yaml.safe_load(Path(recipe).read_text())["train"]["output_dir"])
    rank = int(os.environ["RANK"])
    if kill_at_step is not None and rank == kill_rank:
        name = getattr(signal, signals.get("with_signal", "SIGKILL"))
        threading.Thread(target=_kill_after, args=(out, kill_at_step, name), daemon=True).start()
    raise SystemExit(main(["train", recipe]))


def run_several(recipes: list[str], outcomes: str | None = None, leave: bool = True) -> None:
    """One rank: one run after another in this process, in half the time of as many starts.

    `{rank}` in a recipe's output folder becomes the rank. With `outcomes`, a folder, a run's error does not end the
    others: each rank leaves there what came of each, by the recipe's name. Without `leave` the ranks stay joined.
    """
    import accelerate
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from qwenvl_dist.config import load_recipe
    from qwenvl_dist.errors import CheckFailed, UserError
    from qwenvl_dist.training.run import run_training
    from qwenvl_dist.training.stop import StopSignal

    # It would take the process group away.
    accelerate.Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
    launched = dict(os.environ)  # accelerate leaves words there as a launcher does
    rank, said = os.environ["RANK"], {}
    for recipe in recipes:
        os.environ.clear()
        os.environ.update(launched)
        loaded = load_recipe(recipe)
        out = loaded.train.output_dir.replace("{rank}", rank)
        try:
            run_training(load_recipe(recipe, [f"train.output_dir={out}"]), StopSignal())
            said[Path(recipe).stem] = "finished"
        except (CheckFailed, UserError) as error:
            if outcomes is None:
                raise
            said[Path(recipe).stem] = f"{type(error).__name__}: {error}"
        AcceleratorState._reset_state()
        unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(launched)
    if leave:
        torch.distributed.destroy_process_group()
    if outcomes is not None:
        Path(outcomes, f"{rank}.json").write_text(json.dumps(said))


def _kill_after(out: Path, step: int, number: int) -> None:
    while not any(line.get("step", 0) >= step for line in read_lines(out / "metrics.jsonl")):
        time.sleep(0.005)
    # To the whole group, loader workers included, and from another process: as a launcher or scheduler does it.
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"], check=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read whole JSON lines; a file that is not there has none."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def losses(out: Path) -> list[float]:
    """Return the loss of each logged step, in order."""
    return [line["loss"] for line in read_lines(out / "metrics.jsonl") if "loss" in line]


def ledger(out: Path) -> dict[int, list[str]]:
    """Return the keys of each step over all ranks, sorted."""
    steps: dict[int, list[str]] = {}
    for path in sorted((out / "ledger").glob("rank-*.jsonl")):
        for line in read_lines(path):
            steps.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in sorted(steps.items())}


def adapter(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the float32 masters of a checkpoint, by name."""
    checkpoint = ZeroCheckpoint(out / "checkpoints" / f"step-{step:08d}")
    return {name: checkpoint.fp32(name) for name in checkpoint.shapes}


def assert_same_adapter(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Compare two adapters tensor by tensor."""
    assert set(left) == set(right)
    for name, tensor in left.items():
        torch.testing.assert_close(
            right[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
