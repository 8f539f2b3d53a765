"""What a run folder tells, read with patience: the run may be unfinished, resumed, or without validation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwenvl_dist.checkpoints.manifest import (
    BEST,
    InvalidCheckpoint,
    files_below,
    read_manifest,
    step_folders,
)
from qwenvl_dist.errors import UserError

SCORE_NAMES = (
    "CIDEr",
    "Bleu_1",
    "Bleu_2",
    "Bleu_3",
    "Bleu_4",
    "METEOR",
    "ROUGE_L",
    "box_precision",
    "box_recall",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class CheckpointRow:
    """A step folder."""

    step: int
    num_bytes: int
    val_loss: float | None
    is_best: bool
    world_size: int | None
    zero_stage: int | None
    fault: str | None  # why it is none that a resume would take, as far as its manifest tells


@dataclass(frozen=True)
class RunFolder:
    """A run's files; what is not there is empty."""

    path: Path
    recipe: Record
    recipe_text: str
    launches: list[Record] = field(default_factory=list)
    metrics: list[Record] = field(default_factory=list)
    bad_samples: list[Record] = field(default_factory=list)
    checkpoints: list[CheckpointRow] = field(default_factory=list)  # oldest first
    generations: dict[int, list[Record]] = field(default_factory=dict)  # by step
    base_generations: list[Record] = field(default_factory=list)  # what was said before training

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read a run folder. Raises UserError when it is none."""
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; name the train.output_dir of a run")
        text = _text(path / "recipe.yaml")
        metrics = read_lines(path / "metrics.jsonl")
        if not text and not metrics:
            raise UserError(
                f"{path}: holds neither recipe.yaml nor metrics.jsonl; name the train.output_dir of a run"
            )
        try:
            recipe = yaml.safe_load(text) if text else {}
        except yaml.YAMLError:
            recipe = {}  # shown as it is; the page says less
        generations = {
            int(file.stem.removeprefix("step-")): _list(file)
            for file in sorted((path / "generations").glob("step-*.json"))
            if file.stem.removeprefix("step-").isdigit()
        }
        return cls(
            path=path,
            recipe=recipe if isinstance(recipe, dict) else {},
            recipe_text=text,
            launches=read_lines(path / "launches.jsonl"),
            metrics=metrics,
            bad_samples=read_lines(path / "bad_samples.jsonl"),
            checkpoints=_checkpoints(path / "checkpoints"),
            generations={step: rows for step, rows in generations.items() if rows},
            base_generations=_list(path / "generations" / "base.json"),
        )

    @property
    def steps(self) -> list[Record]:
        """Return the lines about training steps."""
        return [line for line in self.metrics if "loss" in line]

    @property
    def validations(self) -> list[Record]:
        """Return the lines about validation passes that gave a number."""
        return [line for line in self.metrics if line.get("val_loss") is not None]

    @property
    def scores(self) -> list[Record]:
        """Return the lines about caption scores."""
        return [line for line in self.metrics if any(name in line for name in SCORE_NAMES)]

    @property
    def last_step(self) -> int:
        """Return the last step that anything is known of."""
        steps = [line.get("step") or 0 for line in self.metrics] + [row.step for row in self.checkpoints]
        return max(steps, default=0)

    @property
    def total_steps(self) -> int | None:
        """Return the step at which the run ends, if a launch noted it."""
        return self.launches[-1].get("total_steps") if self.launches else None

    def setting(self, *keys: str) -> Any:
        """Return what the recipe says at a path of keys, None where it says nothing."""
        node: Any = self.recipe
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node


def read_lines(path: Path) -> list[Record]:
    """Return the objects of a JSON-lines file that are whole: the last line may be being written."""
    lines = []
    for text in _text(path).split("\n"):  # splitlines() also splits at U+2028
        try:
            record = json.loads(text)
        except ValueError:
            continue
        if isinstance(record, dict):
            lines.append(record)
    return lines


def _list(path: Path) -> list[Record]:
    try:
        content = json.loads(_text(path))
    except ValueError:
        return []
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its rights") from error


def _checkpoints(folder: Path) -> list[CheckpointRow]:
    best = (folder / BEST).resolve()
    rows = []
    for step in reversed(step_folders(folder)):
        manifest, fault = {}, None
        try:
            manifest = read_manifest(step)
            fault = _wrong_size(step, manifest)
        except InvalidCheckpoint as error:
            fault = str(error)
        rows.append(
            CheckpointRow(
                step=int(step.name.removeprefix("step-")),
                num_bytes=sum(file.stat().st_size for file in files_below(step)),
                val_loss=manifest.get("val_loss"),
                is_best=step.resolve() == best,
                world_size=manifest.get("world_size"),
                zero_stage=manifest.get("zero_stage"),
                fault=fault,
            )
        )
    return rows


def _wrong_size(step: Path, manifest: Record) -> str | None:
    """Return the first file that is missing or of another size; hashes are for `resume`, which reads it all."""
    for name, expected in manifest["files"].items():
        file = step / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['size']}"
    return None
