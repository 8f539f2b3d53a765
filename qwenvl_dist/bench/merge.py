"""Seconds and memory of a merge beside `cp -r` of its base and beside peft's way, each in a process of its own.

Every turn begins with the base's files out of the page cache and nothing left to write. Times are of whole processes,
imports included. `cp` leaves its last gigabytes in memory, a merge has all on the disk when it ends:
`cp_synced_seconds` is the copy brought to the disk as well.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch

from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.merge.adapter import LoraDelta, write_peft_folder
from qwenvl_dist.model.base_folder import BaseFolder

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SAMPLE_SECONDS = 0.01  # also what a turn's end may be late
_GIB = 1 << 30

PEFT_WAY = """
import sys
from peft import PeftModel
from transformers import Qwen2VLForConditionalGeneration
base, adapter, out = sys.argv[1:]
model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass
class Turn:
    """One way, once."""

    seconds: float
    synced_seconds: float  # with `sync` of the output after it
    peak_rss_gib: float  # with the pages of mapped files
    peak_anonymous_gib: float


def measure(
    base: Path, checkpoint: Path | None, rank: int, rounds: int, with_peft: bool, scratch: Path
) -> dict:
    """Return medians over `rounds` turns of each way, with ratios.

    Args:
        base: in hub layout.
        checkpoint: what `merge` takes; None for a random adapter of `rank` on the language model's projections.
        rank: of that adapter.
        rounds: turns of each way.
        with_peft: also measure peft's way, which holds the whole model; a peft folder is written for it.
        scratch: folder on the disk to measure; needs room for one output.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="bench-merge-") as name:
        folder = Path(name)
        out, adapter = folder / "out", folder / "adapter"
        if checkpoint is None:
            checkpoint = adapter
            write_random_adapter(BaseFolder(base), rank, adapter)
        elif with_peft:
            _run(_ours(checkpoint, base, "--adapter-out", adapter))
        ways = {"cp": ["cp", "-r", str(base), str(out)], "merge": _ours(checkpoint, base, "--out", out)}
        if with_peft:
            ways["peft"] = [sys.executable, "-c", PEFT_WAY, str(base), str(adapter), str(out)]
        turns: dict[str, list[Turn]] = {way: [] for way in ways}
        for number in range(rounds):
            order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
            for way in order:
                turns[way].append(_turn(ways[way], base, out))
                print(f"{way:6} {turns[way][-1]}", file=sys.stderr)
                shutil.rmtree(out)
    return _report(base, turns)


def _report(base: Path, turns: dict[str, list[Turn]]) -> dict:
    def middle(way: str) -> Turn:
        return Turn(*(round(median(getattr(t, f.name) for t in turns[way]), 3) for f in fields(Turn)))

    cp, ours = middle("cp"), middle("merge")
    report = {
        "gigabytes": round(BaseFolder(base).nbytes / 1e9, 3),
        "rounds": len(turns["cp"]),
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": ours.seconds,
        "cp_seconds": cp.seconds,
        "cp_synced_seconds": cp.synced_seconds,
        "ratio_to_cp": round(ours.seconds / cp.seconds, 3),
        "ratio_to_cp_synced": round(ours.seconds / cp.synced_seconds, 3),
        "peak_rss_gib": ours.peak_rss_gib,
        "peak_anonymous_gib": ours.peak_anonymous_gib,
    }
    if "peft" in turns:
        peft = middle("peft")
        report |= {
            "peft_seconds": peft.seconds,
            "peft_peak_rss_gib": peft.peak_rss_gib,
            "peft_peak_anonymous_gib": peft.peak_anonymous_gib,
            "times_faster_than_peft": round(peft.seconds / ours.seconds, 2),
            "times_smaller_than_peft": round(peft.peak_rss_gib / ours.peak_rss_gib, 2),
            "times_smaller_than_peft_anonymous": round(peft.peak_anonymous_gib / ours.peak_anonymous_gib, 2),
        }
    return report


def table(report: dict) -> str:
    """Return the rows and ratios for people."""
    rows = [f"{'':22}{'seconds':>9}{'RSS, GiB':>10}{'anonymous, GiB':>16}"]
    rows.append(f"{'cp -r':22}{report['cp_seconds']:9.2f}")
    rows.append(f"{'cp -r, then sync':22}{report['cp_synced_seconds']:9.2f}")
    for title, start in (("qwenvl-dist merge", ""), ("peft", "peft_")):
        if f"{start}seconds" in report:
            rows.append(
                f"{title:22}{report[f'{start}seconds']:9.2f}{report[f'{start}peak_rss_gib']:10.2f}"
                f"{report[f'{start}peak_anonymous_gib']:16.2f}"
            )
    rows.append(
        f"merge / cp {report['ratio_to_cp']}, merge / cp and sync {report['ratio_to_cp_synced']}; "
        f"{report['gigabytes']} GB, medians of {report['rounds']}, load average {report['load_average']}"
    )
    if "peft_seconds" in report:
        rows.append(
            f"{report['times_faster_than_peft']} times faster than peft, {report['times_smaller_than_peft']} times "
            f"smaller by RSS, {report['times_smaller_than_peft_anonymous']} by anonymous memory"
        )
    return "\n".join(rows)


def write_random_adapter(base: BaseFolder, rank: int, folder: Path) -> None:
    """Write a peft folder with random adapters on all projections of the language model."""
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, file_name in base.by_runtime_name.items():
        module = name.removesuffix(".weight")
        if module.startswith("model.language_model.") and module.endswith(PROJECTIONS) and module != name:
            rows, columns = base.tensors[file_name].shape
            lora_a = torch.randn(rank, columns, generator=generator) * columns**-0.5
            lora_b = torch.randn(rows, rank, generator=generator) * 0.01
            deltas[module] = LoraDelta(lora_a, lora_b, 2.0)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(PROJECTIONS), "bias": "none",
    }  # fmt: skip
    write_peft_folder(folder, config, deltas, {})


def _ours(checkpoint: Path, base: Path, option: str, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "qwenvl_dist", "merge", str(checkpoint), "--base", str(base), option, str(out),
        "--allow-other-base",
    ]  # fmt: skip


def _turn(command: list[str], base: Path, out: Path) -> Turn:
    """Run a way from a cold start."""
    os.sync()
    for path in base.iterdir():
        if path.is_file():
            _forget(path)
    started = time.perf_counter()
    rss, anonymous = _run(command)
    seconds = time.perf_counter() - started
    subprocess.run(["sync", "-f", str(out)], check=True)
    return Turn(seconds, time.perf_counter() - started, rss, anonymous)


def _forget(path: Path) -> None:
    """Drop a file's clean pages from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _run(command: list[str]) -> tuple[float, float]:
    """Run a command; return its peak resident and its peak anonymous memory, in GiB, as /proc says every 10 ms."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        status, peaks = Path(f"/proc/{process.pid}/status"), {"VmHWM": 0, "RssAnon": 0}
        while process.poll() is None:
            for line in status.read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]))
            time.sleep(_SAMPLE_SECONDS)
        if process.returncode:
            said.seek(0)
            raise CheckFailed(
                f"{' '.join(command[:4])} ended with {process.returncode}: {said.read()[-2000:].decode()}"
            )
    return peaks["VmHWM"] * 1024 / _GIB, peaks["RssAnon"] * 1024 / _GIB
