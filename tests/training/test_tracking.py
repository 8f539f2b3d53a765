"""What SwanLab, TensorBoard and W&B hold after a run that was killed and resumed: one run each, told once."""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from qwenvl_dist.config import make_recipe
from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from qwenvl_dist.data.pictures import find_pictures
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.errors import UserError
from qwenvl_dist.training.tracked_photos import log_generations
from qwenvl_dist.training.tracking import start_trackers
from tests.training.forked import ForkedRanks
from tests.training.forked import train as train_rank
from tests.training.runs import read_lines, write_recipe

pytestmark = pytest.mark.dist

LOGGED = {"loss", "learning_rate", "grad_norm", "samples_per_second", "data_wait_fraction", "peak_memory_gib"}
CONFIG = {
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "train_data_number": 40,
    "prompt": "COCO Yes:",
}
TRACKERS = "tracking.trackers=[swanlab, tensorboard, wandb]"


def start(recipe: Path, world: int, *overrides: str) -> str:
    ranks = ForkedRanks(train_rank, (str(recipe), *overrides), world, recipe.with_suffix(".log"))
    assert ranks.wait(200) == [0] * world, ranks.said()
    return ranks.said()


def write_generations(run: Path, shards: Path) -> None:
    """Write what a run with generation leaves: the base's captions, and those of step 3."""
    entry = Manifest.load(shards).shards[0]
    keys = load_shard_index(index_path(shards / entry.name)).keys[:2]
    folder = run / "generations"
    folder.mkdir()
    for name, said in (("base", "gibberish"), ("step-00000003", "a | red square")):
        rows = [
            {"key": key, "image_id": number, "prompt": "COCO Yes:", "references": ["a red square", "a square"],
             "caption": said, "scores": {"CIDEr": 1.25}}
            for number, key in enumerate(keys)
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(rows))


def killed_after_step_4_and_resumed(
    tmp: Path, base: Path, shards: Path, validation: Path, world: int, *overrides: str
) -> Path:
    """Train alone to step 4, lose that checkpoint, have generated at step 3, go on to step 6 on `world` ranks."""
    run = tmp / "run"
    recipe = write_recipe(
        tmp / "r.yaml", base, shards, run,
        data={"validation": str(validation), "ledger": False},
        train={"grad_accum_steps": 2, "eval_every_steps": 6},
        tracking={"mode": "offline", "project": "captions", "name": "resumed"},
    )  # fmt: skip
    start(recipe, 1, "train.max_steps=4", *overrides)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    write_generations(run, validation)
    start(recipe, world, *overrides)
    return run


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory,
    scenes_base: Path,
    scene_shards: Path,
    scene_validation_shards: Path,
) -> Path:
    """A run told to all trackers without a server, begun by one rank and finished by two."""
    tmp = tmp_path_factory.mktemp("tracking")
    return killed_after_step_4_and_resumed(
        tmp, scenes_base, scene_shards, scene_validation_shards, 2, TRACKERS
    )


def first_key(validation: Path) -> str:
    entry = Manifest.load(validation).shards[0]
    return load_shard_index(index_path(validation / entry.name)).keys[0]


def swanlab_records(folder: Path) -> dict[str, list[Any]]:
    """Return the records of SwanLab's own file, by kind."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = defaultdict(list)
    reader = DataStoreReader()
    (file,) = folder.glob("*.swanlab")
    reader.open(file)
    for data in reader:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found[kind].append(getattr(record, kind))
    reader.close()
    return found


def wandb_records(file: Path) -> dict[str, list[Any]]:
    """Return the records of W&B's own file, by kind."""
    from swanlab.sdk.internal.core_python.store import DataStoreReader
    from wandb.proto.wandb_internal_pb2 import Record

    class Reader(DataStoreReader):  # the same blocks behind another magic word
        def _read_header(self) -> None:
            assert self._fp is not None
            assert self._fp.read(7)[:4] == b":W&B"
            self._index += 7

    found = defaultdict(list)
    reader = Reader()
    reader.open(file)
    for data in reader:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found[kind].append(getattr(record, kind))
    reader.close()
    return found


def test_swanlab_offline_holds_one_run_with_every_step_once(resumed: Path) -> None:
    (folder,) = (path for path in (resumed / "swanlab").iterdir() if path.is_dir())
    records = swanlab_records(folder)
    assert records["start"][0].id == json.loads((resumed / "tracking.json").read_text())["swanlab"]
    assert records["start"][0].name == "resumed"
    steps = defaultdict(list)
    for scalar in records["scalar"]:
        steps[scalar.key].append((scalar.step, scalar.value.number))
    assert steps.keys() >= LOGGED
    logged = read_lines(resumed / "metrics.jsonl")
    assert steps["loss"] == [(line["step"], line["loss"]) for line in logged if "loss" in line]
    assert [step for step, _ in steps["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in steps["val_loss"]] == [6]
    # The history before the resume was told a second time under the same id; what was told first lies aside.
    (aside,) = (path for path in (resumed / "discarded" / "swanlab").iterdir() if path.is_dir())
    assert swanlab_records(aside)["start"][0].id == records["start"][0].id


def test_swanlab_holds_configuration_and_photos_with_captions(resumed: Path) -> None:
    (folder,) = (path for path in (resumed / "swanlab").iterdir() if path.is_dir())
    config = yaml.safe_load((folder / "files" / "config.yaml").read_text())
    assert {key: config[key]["value"] for key in CONFIG} == CONFIG
    assert config["launch/world_size"]["value"] == 2
    assert config["launch/deepspeed/zero_optimization/stage"]["value"] == 2
    assert config["launch/versions/torch"]["value"] == torch.__version__.partition("+")[0]
    media = {record.key: record for record in swanlab_records(folder)["media"]}
    photos = media["validation/photos"].value.items
    assert (media["validation/photos"].step, len(photos)) == (3, 2)
    assert photos[0].caption.splitlines() == [
        "reference: a red square / a square", "before training: gibberish", "now: a | red square", "CIDEr: 1.25"
    ]  # fmt: skip
    for photo in photos:
        with Image.open(folder / "media" / "image" / photo.filename) as image:
            assert image.size == (56, 56)
    (table,) = media["validation/captions"].value.items
    rows = json.loads((folder / "media" / "echarts" / table.filename).read_text())["rowData"]
    assert [row["now"] for row in rows] == ["a | red square"] * 2


def test_wandb_offline_holds_one_run_with_every_step_once(resumed: Path) -> None:
    (file,) = (resumed / "wandb").glob("offline-run-*/*.wandb")
    records = wandb_records(file)
    run = records["run"][0]
    assert run.run_id == json.loads((resumed / "tracking.json").read_text())["wandb"]
    assert (run.project, run.display_name) == ("captions", "resumed")
    history = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line.item}
               for line in records["history"]]  # fmt: skip
    assert [line["_step"] for line in history if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["_step"] for line in history if "validation/captions/nrows" in line] == [0, 3]
    assert sum(line.keys() >= LOGGED for line in history) == 6
    assert len(list((resumed / "wandb").glob("offline-run-*/files/media/images/**/*.jpg"))) == 4
    told = {u.key or "/".join(u.nested_key): json.loads(u.value_json)
            for record in records["config"] for u in record.update}  # fmt: skip
    assert {key: told[key] for key in CONFIG} == CONFIG


def test_tensorboard_shows_one_run_with_every_step_once(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    runs = EventMultiplexer().AddRunsFromDirectory(str(resumed / "tensorboard")).Reload()
    assert list(runs.Runs()) == ["captions"]
    assert set(runs.Runs()["captions"]["scalars"]) >= LOGGED
    assert [event.step for event in runs.Scalars("captions", "loss")] == [1, 2, 3, 4, 5, 6]
    logged = [line["loss"] for line in read_lines(resumed / "metrics.jsonl") if "loss" in line]
    assert [event.value for event in runs.Scalars("captions", "loss")] == pytest.approx(logged)
    hparams = runs.SummaryMetadata("captions", "_hparams_/session_start_info").plugin_data.content
    assert b"lora_rank" in hparams


def test_tensorboard_takes_photos_and_captions(tmp_path: Path, scene_validation_shards: Path) -> None:
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker("captions", tmp_path)
    tracker.start()
    key = first_key(scene_validation_shards)
    pictures = find_pictures(ShardSet(scene_validation_shards), [key])
    rows = [{"key": key, "caption": "one | two", "references": ["three"], "scores": {"CIDEr": 0.5}}]
    log_generations([tracker], 7, rows, [{"key": key, "caption": "base"}], pictures)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "captions")).Reload()
    (image,) = events.Images(f"validation/{key}")
    assert (image.step, image.width, image.height) == (7, 56, 56)
    (text,) = events.Tensors("validation/captions/text_summary")
    assert f"| {key} |  | three | base | one \\| two | 0.500 |" in text.tensor_proto.string_val[0].decode()


def test_only_one_rank_prints_the_numbers(resumed: Path) -> None:
    said = resumed.with_name("r.log").read_text()
    for step in (1, 2, 3, 5, 6):
        assert len(re.findall(rf"(?m)^step {step}/\d  epoch .* left 0:00:", said)) == 1
    assert len(re.findall(r"(?m)^step 4/\d  epoch", said)) == 2  # before and after the resume


def test_each_launch_left_what_it_ran_on(resumed: Path) -> None:
    first, second = read_lines(resumed / "launches.jsonl")
    assert (first["step"], first["world_size"], first["total_steps"]) == (0, 1, 4)
    assert (second["step"], second["world_size"], second["total_steps"]) == (3, 2, 6)
    assert list(second["hosts"].values()) == [2]
    assert (second["samples_per_epoch"], second["validation_samples"], second["prompt"]) == (
        40,
        12,
        "COCO Yes:",
    )
    assert second["versions"].keys() >= {"python", "torch", "deepspeed", "peft"}
    assert second["git_revision"] is None or len(second["git_revision"].removesuffix("-dirty")) == 40


def state_of(run: Path, mode: str, init_trackers: Any) -> Any:
    """What starting trackers looks at, of a run that was resumed at step 7."""
    recipe = make_recipe(
        {
            "data": {"train": "shards"},
            "train": {"output_dir": str(run)},
            "tracking": {"mode": mode, "trackers": ["swanlab", "wandb", "tensorboard"], "name": "mine"},
        },
        "a test",
    )
    return SimpleNamespace(
        recipe=recipe,
        topology=SimpleNamespace(is_main=True),
        progress=SimpleNamespace(step=7),
        identity=SimpleNamespace(samples_per_epoch=40),
        accelerator=SimpleNamespace(trackers=[], init_trackers=init_trackers),
    )


def test_online_a_later_start_goes_on_with_the_runs_of_the_first(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    state = state_of(tmp_path, "online", lambda project, init_kwargs: asked.append(init_kwargs))
    (tmp_path / "swanlab").mkdir()
    for _ in range(2):
        start_trackers(state, {"prompt": "COCO Yes:"})
    ids = json.loads((tmp_path / "tracking.json").read_text())
    first, second = asked
    assert first == second
    for name in ("swanlab", "wandb"):
        options = first[name]
        assert [options[key] for key in ("mode", "id", "resume", "name")] == [
            "online",
            ids[name],
            "allow",
            "mine",
        ]
    assert first["tensorboard"] == {"purge_step": 8}
    assert (tmp_path / "swanlab").is_dir()  # only a folder that is told again moves aside


def test_online_without_a_key_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import SwanLabTracker

    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_INTERACTIVE", "false")  # it would ask whoever sits at the terminal
    monkeypatch.setenv("HOME", str(tmp_path))

    def init_trackers(project: str, init_kwargs: dict[str, Any]) -> None:
        SwanLabTracker(project, **init_kwargs["swanlab"]).start()

    with pytest.raises(UserError, match=r"tracking.mode = online: .*no .*; .*use mode offline") as error:
        start_trackers(state_of(tmp_path, "online", init_trackers), {"prompt": None})
    assert "\n" not in str(error.value)
