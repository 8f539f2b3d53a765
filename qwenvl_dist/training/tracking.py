"""Experiment trackers, through accelerate: one run in each, however often the training is started again.

A tracker's run has an id that the run folder keeps. Online, a later start goes on with the run of that id. SwanLab and
W&B without a server cannot go on with a folder that an earlier process wrote: that moves to `discarded/`, and the
surviving history is told again from the run folder, under the same id. TensorBoard goes on in its folder; steps that a
resume undoes are struck out there.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.pictures import find_pictures
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import write_atomic
from qwenvl_dist.logs import get_logger
from qwenvl_dist.training.output_folder import set_aside
from qwenvl_dist.training.tracked_photos import Tracker, log_generations, markdown_cell

if TYPE_CHECKING:
    from qwenvl_dist.training.state import TrainState

log = get_logger(__name__)
IDS = "tracking.json"
GENERATIONS, BASE = "generations", "base.json"
PHOTOS_TRACKED = 16  # of one evaluation


def flat_config(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"optim/learning_rate": 1e-4, ...}: trackers take only plain values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flat_config(value, f"{prefix}{key}/"))
        else:
            plain = value is None or isinstance(value, bool | int | float | str)
            flat[prefix + key] = value if plain else str(value)
    return flat


def plain_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a line of metrics.jsonl by flat names, without its step."""
    return {
        key: value
        for key, value in flat_config(line).items()
        if key != "step" and isinstance(value, int | float)
    }


def run_config(state: TrainState, launch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration: first under the names that people look for, then the whole recipe and launch."""
    recipe = state.recipe
    lora = recipe.lora
    named = {
        "model": recipe.model.base,
        "dataset": recipe.data.training_places,
        "prompt": launch["prompt"],
        "train_data_number": state.identity.samples_per_epoch,
        "lora_rank": lora.rank if lora else None,
        "lora_alpha": lora.alpha if lora else None,
        "lora_dropout": lora.dropout if lora else None,
    }
    return flat_config({**named, **{f"recipe/{k}": v for k, v in recipe.to_dict().items()}, "launch": launch})


def start_trackers(state: TrainState, launch: Mapping[str, Any]) -> None:
    """Start the recipe's trackers, or go on with their runs. Every rank calls it, rank 0 writes.

    Raises UserError when one cannot be started, for instance online without a key.
    """
    recipe, tracking = state.recipe, state.recipe.tracking
    if tracking.mode == "disabled" or not tracking.trackers:
        return
    run = Path(recipe.train.output_dir)
    told_again: list[str] = []
    ids: dict[str, str] = {}
    if state.topology.is_main:
        ids = _ids(run)
        if tracking.mode != "online":
            told_again = [name for name in ("swanlab", "wandb") if name in tracking.trackers]
            for name in told_again:
                if (run / name).exists():
                    set_aside(run, run / name)
    try:
        state.accelerator.init_trackers(tracking.project, init_kwargs=_options(state, run, ids))
    except Exception as error:  # each has errors of its own
        reason = " ".join(str(error).split())
        raise UserError(
            f"tracking.mode = {tracking.mode}: {', '.join(tracking.trackers)} could not be started: {reason}; "
            "mend that, or use mode offline or disabled"
        ) from error
    if not state.topology.is_main:
        return
    config = run_config(state, launch)
    for tracker in state.accelerator.trackers:
        if tracker.name == "tensorboard":
            _store_in_tensorboard(tracker, config, state.progress.step)
        else:
            tracker.store_init_configuration(config)
    _tell_again(state, run, [tracker for tracker in state.accelerator.trackers if tracker.name in told_again])


def _ids(run: Path) -> dict[str, str]:
    """Return each tracker's id of this run, made at its first start."""
    path = run / IDS
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {name: str(found[name]) for name in ("swanlab", "wandb")}
        except (ValueError, KeyError, TypeError):
            log.warning("%s cannot be read: the trackers begin new runs", path)
    ids = {name: secrets.token_hex(8) for name in ("swanlab", "wandb")}
    write_atomic(path, (json.dumps(ids) + "\n").encode())
    return ids


def _options(state: TrainState, run: Path, ids: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what each tracker is started with."""
    tracking = state.recipe.tracking
    online = tracking.mode == "online"
    options: dict[str, dict[str, Any]] = {
        "swanlab": {
            "mode": tracking.mode,
            "log_dir": str(run / "swanlab"),
            "name": tracking.name,
            "id": ids.get("swanlab"),
            "resume": "allow",
        },
        "wandb": {
            "mode": "online" if online else "offline",
            "dir": str(run),
            "name": tracking.name,
            "id": ids.get("wandb"),
            **({"resume": "allow"} if online else {}),
        },
        # Events of later steps are from before a resume.
        "tensorboard": {"purge_step": state.progress.step + 1},
    }
    return {name: options[name] for name in tracking.trackers}


def _store_in_tensorboard(tracker: Tracker, config: Mapping[str, Any], step: int) -> None:
    """Write the configuration beside the metrics; accelerate would make a run of its own of it."""
    from torch.utils.tensorboard.summary import hparams

    writer = tracker.tracker
    plain = {key: value for key, value in config.items() if value is not None}
    for summary in hparams(plain, {}):
        writer.file_writer.add_summary(summary)
    rows = "\n".join(f"| {key} | {markdown_cell(value)} |" for key, value in plain.items())
    writer.add_text("config", f"| key | value |\n|---|---|\n{rows}", global_step=step)
    writer.flush()


def _tell_again(state: TrainState, run: Path, trackers: Sequence[Tracker]) -> None:
    """Log the surviving history of earlier starts to trackers that begin with nothing."""
    if not trackers:
        return
    lines: list[tuple[int, dict[str, Any] | None]] = []
    path = run / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        if text:
            line = json.loads(text)  # whole: a resume has dropped a torn one
            lines.append((line["step"], plain_metrics(line)))
    lines += [(step, None) for step in _generated_steps(run) if step <= state.progress.step]
    for step, values in sorted(lines, key=lambda line: line[0]):
        if values is None:
            _track_generations(state, run, step, trackers)
            continue
        for tracker in trackers:
            tracker.log(values, step=step)


def _generated_steps(run: Path) -> list[int]:
    """Return the steps after which captions were generated; 0 is the base."""
    found = [0] if (run / GENERATIONS / BASE).is_file() else []
    names = [path.stem.removeprefix("step-") for path in (run / GENERATIONS).glob("step-*.json")]
    return found + sorted(int(name) for name in names if name.isdigit())


def track_generations(state: TrainState) -> None:
    """Send what was generated after the current step to the trackers, from the run folder. Every rank may call it."""
    if state.topology.is_main and state.accelerator.trackers:
        run = Path(state.recipe.train.output_dir)
        _track_generations(state, run, state.progress.step, state.accelerator.trackers)


def _track_generations(state: TrainState, run: Path, step: int, trackers: Sequence[Tracker]) -> None:
    rows = _read_generations(run, f"step-{step:08d}.json" if step else BASE)[:PHOTOS_TRACKED]
    before = _read_generations(run, BASE) if step else []
    found: dict[str, bytes] = {}
    if state.validation is not None and state.validation.shards.manifest.features is None:
        found = find_pictures(state.validation.shards, [row["key"] for row in rows])
    log_generations(trackers, step, rows, before, found)


def _read_generations(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / GENERATIONS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
