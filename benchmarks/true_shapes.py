"""Train a true shape on real processes and tell seconds and peak memory of each.

    python benchmarks/true_shapes.py BASE SHARDS --zero 3 [--steps 3] [--processes 2] [--json]

Runs the product's own `train` with LoRA, one picture a rank and activation checkpointing on the language model. BASE is
a model folder (`qwenvl-dist synthetic base --shape 2b|7b` writes one with random weights), SHARDS what
`qwenvl-dist shards pack` wrote. Memory is what the kernel reports of each training process: VmHWM, the most it held,
and the resident size when each step has been logged. When the machine runs short of memory, all is stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.5


@dataclass
class Memory:
    """What one rank held, GiB."""

    peak: float = 0.0
    after_step: dict[int, float] = field(default_factory=dict)


def write_recipe(path: Path, args: argparse.Namespace) -> Path:
    """Write the run's recipe; return its output folder."""
    out = path.with_name("run")
    recipe = {
        "model": {"base": str(Path(args.base).resolve()), "dtype": "bfloat16", "checkpointing": "all"},
        "data": {
            "train": str(Path(args.shards).resolve()), "image_size": args.image_size,
            "micro_batch_size": 1, "workers": 1,
        },
        "train": {
            "max_steps": args.steps, "grad_accum_steps": 1, "log_every_steps": 1,
            "checkpoint_every_steps": 100_000, "timeout_seconds": 1800, "output_dir": str(out),
        },
        "tracking": {"mode": "disabled"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return out


def write_launch_file(path: Path, args: argparse.Namespace) -> Path:
    """Write accelerate's file: the shipped one, with the DeepSpeed file that was asked for."""
    config = yaml.safe_load((ROOT / f"launch/accelerate/cpu_zero{args.zero}.yaml").read_text())
    if args.deepspeed_config:
        config["deepspeed_config"]["deepspeed_config_file"] = str(Path(args.deepspeed_config).resolve())
    path.write_text(yaml.safe_dump(config))
    return path


def launch(recipe: Path, args: argparse.Namespace, log: Path) -> subprocess.Popen[bytes]:
    """Start accelerate as a user does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "accelerate", "launch", "--config_file", str(write_launch_file(recipe.with_name("launch.yaml"), args)),
        "--num_processes", str(args.processes), "--main_process_port", str(port),
        "-m", "qwenvl_dist", "train", str(recipe),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **os.environ}
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file, start_new_session=True)


def training_processes(launcher: int) -> dict[int, int]:
    """Return {rank: pid} of the launcher's children that train."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in task.read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((v[5:] for v in variables if v.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank)] = int(pid)
    return found


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and its ranks, each of which leads a session of its own, and wait."""
    if process.poll() is None:
        for group in (*training_processes(process.pid).values(), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.wait()


def kernel_gib(path: str, key: str) -> float:
    """Return a line of a file such as /proc/meminfo, in GiB."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    return 0.0  # a process that is ending has no memory


def logged_steps(out: Path) -> list[dict]:
    """Return the steps that metrics.jsonl holds so far."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [step for step in map(json.loads, lines) if "loss" in step]


def watch(process: subprocess.Popen[bytes], out: Path, least_gib: float) -> dict[int, Memory]:
    """Follow the run to its end; stop it when the machine has less than `least_gib` left."""
    memory: dict[int, Memory] = {}
    while process.poll() is None:
        left = kernel_gib("/proc/meminfo", "MemAvailable")
        if left < least_gib:
            held = {rank: (round(each.peak, 2), each.after_step) for rank, each in memory.items()}
            sys.exit(
                f"stopped: {left:.2f} GiB left on the machine; the processes held (at most, after steps) {held}"
            )
        try:
            steps = len(logged_steps(out))
            for rank, pid in training_processes(process.pid).items():
                status = f"/proc/{pid}/status"
                each = memory.setdefault(rank, Memory())
                each.peak = max(each.peak, kernel_gib(status, "VmHWM"))
                if steps not in each.after_step:
                    each.after_step[steps] = kernel_gib(status, "VmRSS")
        except (OSError, ValueError):
            pass  # a process ended, or a line was half written, while we looked
        time.sleep(POLL_SECONDS)
    return memory


def measure(args: argparse.Namespace) -> dict:
    """Run and report."""
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        recipe, log = Path(folder, "recipe.yaml"), Path(folder, "log")
        out = write_recipe(recipe, args)
        process = launch(recipe, args, log)
        try:
            memory = watch(process, out, args.least_gib)
        finally:
            stop(process)
        text = log.read_text()
        if process.returncode:
            sys.exit(text[-4000:])
        steps = logged_steps(out)
    read, ready = (re.search(p, text) for p in (r"read .* in ([\d.]+) s", r"ready after ([\d.]+) s"))
    return {
        "base": Path(args.base).name,
        "zero": args.zero,
        "load_seconds": float(read[1]) if read else None,
        "ready_seconds": float(ready[1]) if ready else None,
        "step_seconds": [round(step["step_seconds"], 1) for step in steps],
        "losses": [step["loss"] for step in steps],
        "peak_gib": [round(memory[rank].peak, 2) for rank in sorted(memory)],
        "resident_gib_after_step": [
            {step: round(gib, 2) for step, gib in sorted(memory[rank].after_step.items()) if step}
            for rank in sorted(memory)
        ],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("shards")
    parser.add_argument("--zero", type=int, choices=(2, 3), required=True)
    parser.add_argument("--deepspeed-config", help="default: the shipped file of the stage")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=280)
    parser.add_argument("--least-gib", type=float, default=1.5, help="stop when the machine has less left")
    parser.add_argument("--work", help="folder for the run's files; default the system's for temporary files")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("stopped by a signal")
    )  # or the ranks would stay behind
    report = measure(args)
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
