"""Run folders as training leaves them, written by hand in a moment."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from qwenvl_dist.checkpoints.manifest import describe_file, files_below, step_folder, write_manifest
from qwenvl_dist.config import make_recipe
from qwenvl_dist.data.index import Manifest, index_path, load_shard_index

HOSTILE = "<script>document.title='taken'</script> & <b>bold</b>"
WIDE = "W" * 180  # no place to break


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_line(step: int) -> dict[str, Any]:
    return {
        "step": step, "epoch": step / 20, "loss": 3 * math.exp(-step / 15), "learning_rate": 1e-4 * (1 - step / 60),
        "grad_norm": None if step == 7 else 1.0 / step, "samples_per_second": 100.0 + step % 5,
        "target_tokens_per_second": 1000.0, "data_wait_fraction": 0.02, "step_seconds": 0.1,
        "peak_memory_gib": 1.5, "bad_samples": 0, "target_tokens": 64,
        "own_seconds": {"fastest": 0.1, "median": 0.1, "slowest": 0.2},
    }  # fmt: skip


def launch(step: int, world: int, **more: Any) -> dict[str, Any]:
    return {
        "time": "2026-03-01T10:00:00+00:00", "step": step, "total_steps": 60, "world_size": world,
        "grad_accum_steps": 4, "global_batch_size": 16 * world, "hosts": {"node0": world}, "device": "CPU",
        "zero_stage": 2, "samples_per_epoch": 40, "validation_samples": 12,
        "prompt": "COCO Yes:", "working_folder": "/", "git_revision": "0" * 40,
        "versions": {"torch": "2.14.1", "deepspeed": "0.19.8"},
        "deepspeed": {"zero_optimization": {"stage": 2}}, **more,
    }  # fmt: skip


def keys_of(shards: Path) -> list[str]:
    return [
        key
        for entry in Manifest.load(shards).shards
        for key in load_shard_index(index_path(shards / entry.name)).keys
    ]


def write_checkpoint(run: Path, step: int, val_loss: float | None) -> Path:
    folder = step_folder(run / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(bytes(1_234_567))
    files = {path.name: describe_file(path) for path in files_below(folder)}
    write_manifest(
        folder, {"step": step, "world_size": 2, "zero_stage": 2, "val_loss": val_loss, "files": files}
    )
    return folder


def write_bare_run(run: Path) -> Path:
    """A run that was killed in its first steps: no validation, no checkpoint, a torn last line."""
    run.mkdir()
    write_lines(run / "metrics.jsonl", [step_line(step) for step in (1, 2, 3)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    return run


def write_full_run(run: Path, validation: Path) -> Path:
    """A run that was resumed once and stopped at step 50 of 60, with all that a report can show."""
    run.mkdir()
    recipe = make_recipe(
        {"data": {"train": "shards/train", "validation": str(validation)}, "tracking": {"name": "made run"}},
        "made run",
    )
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    assert yaml.safe_load(recipe.to_yaml())["data"]["validation"] == str(validation)
    lines = [step_line(step) for step in range(1, 51)]
    lines += [{"step": step, "val_loss": 2 / step} for step in (10, 20, 30, 40)] + [
        {"step": 50, "val_loss": 0.9}
    ]
    lines += [
        {"step": step, "CIDEr": step / 10, "Bleu_4": 0.5, "ROUGE_L": 0.6, "generated_per_second": 3.0}
        for step in (0, 25, 50)
    ]
    write_lines(run / "metrics.jsonl", sorted(lines, key=lambda line: line["step"]))
    write_lines(run / "launches.jsonl", [launch(0, 1), launch(20, 2)])
    write_lines(
        run / "bad_samples.jsonl",
        [{"shard": "shard-000000.tar", "key": WIDE, "reason": f"cannot decode {HOSTILE}", "step": 3}],
    )
    best = write_checkpoint(run, 40, 0.05)
    (run / "checkpoints" / "best").symlink_to(best.name)
    (write_checkpoint(run, 50, 0.9) / "state.pt").write_bytes(b"cut short")
    generations = run / "generations"
    generations.mkdir()
    for name, caption in (("base", WIDE), ("step-00000025", "old"), ("step-00000050", HOSTILE)):
        rows = [
            {"key": key, "image_id": number, "prompt": "COCO Yes:", "references": [f"reference {number}"],
             "caption": f"reference {number}" if number == 3 and name != "base" else f"{caption} {number}",
             "scores": {"CIDEr": (number * 7 % 12) / 4}}
            for number, key in enumerate(keys_of(validation))
        ]  # fmt: skip
        (generations / f"{name}.json").write_text(json.dumps(rows))
    return run
