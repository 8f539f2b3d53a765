"""What a checkpoint holds, that background and gathered writing change none of it, and which one a resume takes."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.checkpoints import manifest as manifests
from qwenvl_dist.checkpoints.torch_file import load_torch_file
from qwenvl_dist.config import PROJECTIONS
from qwenvl_dist.synthetic.base import SHAPES, base_tensors
from tests.ranks import run_ranks
from tests.training import forked
from tests.training.forked import ForkedRanks
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, write_recipe

pytestmark = pytest.mark.dist
RANK_1 = f"{manifests.PARTITIONS}/zero_pp_rank_1_mp_rank_00_optim_states.pt"
RUNS: dict[str, dict[str, Any]] = {  # name -> ZeRO stage and the train section; each is of two ranks
    "sync-2": {"stage": 2},
    "sync-3": {"stage": 3},
    "async-2": {"stage": 2, "checkpoint_async": True},
    "async-3": {"stage": 3, "checkpoint_async": True},
    "apart-refused": {"stage": 2, "output_dir": "apart-refused-{rank}"},
    "blocked": {"stage": 2, "output_dir": "blocked-{rank}"},
    "apart-3": {"stage": 3, "output_dir": "apart-{rank}", "output_shared": False, "max_steps": 2},
    "apart-3-again": {"stage": 3, "output_dir": "apart-{rank}", "output_shared": False},
    "full-sync": {"stage": 2},
    "full-async": {"stage": 3, "checkpoint_async": True, "max_steps": 12, "checkpoint_every_steps": 3},
}
STEPS = 3


@pytest.fixture(scope="module")
def said(
    tmp_path_factory: pytest.TempPathFactory, scenes_base: Path, scene_shards: Path
) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """The folder of all runs, and what each rank said of each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipes, mounts = [], []
    (folder / "blocked-1").touch()  # where rank 1's folder should be
    for name, section in RUNS.items():
        if name.startswith("full"):  # on a file system that two checkpoints fit in
            place = folder / name / "checkpoints"
            place.mkdir(parents=True)
            mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(place)]
            if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
                continue
            mounts.append(place)
        train: dict[str, Any] = {"max_steps": STEPS, "grad_accum_steps": 1, "checkpoint_every_steps": 1}
        train |= {key: value for key, value in section.items() if key not in ("stage", "output_dir")}
        recipes.append(
            write_recipe(
                folder / f"{name}.yaml", scenes_base, scene_shards, folder / section.get("output_dir", name),
                section["stage"], train=train, data={"workers": 0},
                optim={"schedule": "constant", "warmup_ratio": 0.0},
            )
        )  # fmt: skip
    try:
        run_ranks(
            "tests.training.runs:run_several", 2, timeout=TIMEOUT, recipes=[str(path) for path in recipes],
            outcomes=str(folder), env={"LOCAL_RANK": "0"},
        )  # fmt: skip
        yield folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    finally:
        for place in mounts:
            subprocess.run(["umount", str(place)], check=True)


def step_of(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in manifests.files_below(folder)}


def tensors_below(folder: Path) -> dict[tuple[str, str], bytes]:
    """The tensors in the files of partitions, and the others' bytes.

    DeepSpeed writes ids down that count on from run to run of a process.
    """
    found = {}
    for path in manifests.files_below(folder):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                found |= {(name, part): archive.read(part) for part in archive.namelist() if "/data/" in part}
        else:
            found[name, ""] = path.read_bytes()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_background_writing_leaves_the_same_bytes(said, stage: int) -> None:
    folder, outcomes = said
    assert [each[f"async-{stage}"] for each in outcomes] == ["finished"] * 2
    for step in range(1, STEPS + 1):
        sync, background = (step_of(folder / f"{kind}-{stage}", step) for kind in ("sync", "async"))
        if stage == 2:
            assert bytes_below(background) == bytes_below(sync)
            assert manifests.verify_step(background) == manifests.verify_step(sync)
        assert tensors_below(background) == tensors_below(sync)
        assert manifests.verify_step(background)["step"] == step


def test_node_local_folders_are_refused_with_the_remedy(said) -> None:
    folder, outcomes = said
    for each in outcomes:
        assert "ranks [1] do not see what rank 0 writes there" in each["apart-refused"]
        assert each["apart-refused"].startswith("UserError: train.output_dir = ")
        assert each["apart-refused"].endswith(
            "set train.output_shared=false to gather checkpoints on the node of rank 0"
        )
    assert not list(folder.glob("apart-refused-*/*")) and not list(folder.glob("apart-refused-*/.*"))


def test_a_folder_that_one_rank_cannot_write_is_told_at_the_start(said) -> None:
    folder, outcomes = said
    for each in outcomes:
        assert each["blocked"].startswith("UserError: train.output_dir = ")
        assert (
            f"rank 1 cannot write there: File exists ({folder / 'blocked-1'}); choose another"
            in each["blocked"]
        )


def test_node_local_folders_are_gathered_and_resumed_when_the_recipe_says_so(said) -> None:
    folder, outcomes = said
    assert [each["apart-3"] for each in outcomes] == ["finished"] * 2
    assert [each["apart-3-again"] for each in outcomes] == ["finished"] * 2
    assert not (folder / "apart-1" / "checkpoints").exists()
    assert tensors_below(step_of(folder / "apart-0")) == tensors_below(step_of(folder / "sync-3"))
    manifests.verify_step(step_of(folder / "apart-0"))
    assert losses(folder / "apart-0") == losses(folder / "sync-3")
    assert [line["step"] for line in read_lines(folder / "apart-1" / "ledger" / "rank-00001.jsonl")] == [
        1,
        2,
        3,
    ]
    assert sorted(ledger(folder / "apart-0")) == [1, 2, 3]


@pytest.mark.parametrize(("kind", "step"), [("sync", 3), ("async", 9)])
def test_a_full_disk_ends_all_ranks_with_one_message_and_leaves_what_was_whole(
    said, kind: str, step: int
) -> None:
    folder, outcomes = said
    if f"full-{kind}" not in outcomes[0]:
        pytest.skip("needs root to mount a small file system")
    messages = {each[f"full-{kind}"] for each in outcomes}
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith(f"CheckpointError: checkpoint of step {step} could not be written: rank ")
    assert "No space left on device" in message and "mend the storage and start again" in message
    checkpoints = folder / f"full-{kind}" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        f"step-{number * step // 3:08d}" for number in (1, 2)
    ]
    for whole in checkpoints.iterdir():
        manifests.verify_step(whole)


def damage(reason: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        DAMAGES[function.__name__] = (function, reason)
        return function

    return register


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {}


@damage(f"{RANK_1} is missing")
def missing(step: Path) -> None:
    (step / RANK_1).unlink()


@damage("MANIFEST.json is missing")
def without_manifest(step: Path) -> None:
    (step / manifests.MANIFEST).unlink()


@damage("MANIFEST.json cannot be read")
def torn_manifest(step: Path) -> None:
    text = (step / manifests.MANIFEST).read_text()
    (step / manifests.MANIFEST).write_text(text[: len(text) // 2])


@damage(" bytes instead of ")
def truncated(step: Path) -> None:
    os.truncate(step / RANK_1, (step / RANK_1).stat().st_size - 100)


@damage("has 0 bytes instead of ")
def empty(step: Path) -> None:
    os.truncate(step / RANK_1, 0)


@damage("has another checksum")
def flipped_byte(step: Path) -> None:
    content = bytearray((step / RANK_1).read_bytes())
    content[len(content) // 2] ^= 1
    (step / RANK_1).write_bytes(content)


@damage("has another checksum")
def another_steps_file(step: Path) -> None:
    shutil.copy(step.with_name("step-00000001") / RANK_1, step / RANK_1)


def list_again(step: Path) -> None:
    """Let the manifest say what is there, as if it had been written so."""
    manifest = manifests.read_manifest(step)
    manifest["files"] = {name: manifests.describe_file(step / name) for name in sorted(bytes_below(step))}
    (step / manifests.MANIFEST).write_text(json.dumps(manifest))


@damage("[1, 3]")
def written_with_another_steps_file(step: Path) -> None:
    another_steps_file(step)
    list_again(step)


@damage("zero_pp_rank_2_mp_rank_00_optim_states.pt does not belong to it")
def stale_extra_rank(step: Path) -> None:
    shutil.copy(step / RANK_1, str(step / RANK_1).replace("rank_1", "rank_2"))


@damage("rank")
def written_with_a_stale_extra_rank(step: Path) -> None:
    stale_extra_rank(step)
    list_again(step)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", DAMAGES)
def test_resume_takes_the_newest_that_verifies_and_says_why_it_skipped(
    said, name: str, stage: int, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(said[0] / f"sync-{stage}" / "checkpoints", checkpoints)
    spoil, reason = DAMAGES[name]
    spoil(checkpoints / "step-00000003")
    folder, manifest, skipped = manifests.newest_valid(checkpoints)
    assert folder == checkpoints / "step-00000002" and manifest["step"] == 2
    (line,) = skipped
    assert line.startswith("step-00000003: ") and reason in line


def start_alone(recipe: Path, **train: Any) -> str:
    """Run to the end on one rank, with the same global batch; return what it said."""
    overrides = [f"train.{key}={value}" for key, value in {"grad_accum_steps": 2, **train}.items()]
    ranks = ForkedRanks(forked.train, (str(recipe), *overrides), 1, recipe.with_suffix(".log"))
    assert ranks.wait(TIMEOUT) == [0], ranks.said()[-4000:]
    return ranks.said()


def test_a_start_says_what_it_passes_over_and_tidies_up(said, tmp_path: Path) -> None:
    folder, _ = said
    out = shutil.copytree(folder / "sync-2", tmp_path / "run")
    truncated(step_of(out))
    leftover = out / "checkpoints" / ".step-00000007.partial"
    leftover.mkdir()
    recipe = shutil.copy(folder / "sync-2.yaml", tmp_path / "again.yaml")
    text = start_alone(recipe, output_dir=out)
    assert f"resume: skipped step-00000003: {RANK_1} has" in text
    assert re.search(r"resumed from \S+/step-00000002: step 2$", text, re.MULTILINE)
    assert (out / "discarded" / "checkpoints" / "step-00000003").is_dir() and not leftover.exists()
    assert manifests.verify_step(step_of(out))["world_size"] == 1
    assert losses(out) == pytest.approx(losses(folder / "sync-2"), rel=1e-5)


def test_a_resume_from_another_run_keeps_nothing_of_what_was_in_the_folder(said, tmp_path: Path) -> None:
    folder, _ = said
    out = tmp_path / "run"
    shutil.copytree(step_of(folder / "sync-3", 1), step_of(out, 1))
    (out / "checkpoints" / "best").symlink_to("step-00000001")
    source = tmp_path / "source" / "step-00000002"
    shutil.copytree(step_of(folder / "sync-2", 2), source)
    manifest = manifests.read_manifest(source)
    manifest["progress"]["best_val_loss"] = manifest["val_loss"] = 1e-3
    (source / manifests.MANIFEST).write_text(json.dumps(manifest))
    recipe = shutil.copy(folder / "sync-2.yaml", tmp_path / "other.yaml")
    start_alone(recipe, output_dir=out, resume=source)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000003"]
    assert (out / "discarded" / "checkpoints" / "step-00000001").is_dir()
    assert manifests.read_manifest(step_of(out))["progress"]["best_val_loss"] is None


LORA_RANK = 8


def adapter_elements(shape: str) -> int:
    """Of LoRA on the seven projections: rank x (rows + columns) each."""
    dims = [dims for name, dims in base_tensors(SHAPES[shape])
            if name.removesuffix(".weight").endswith(PROJECTIONS) and not name.startswith("visual.")]  # fmt: skip
    return LORA_RANK * sum(rows + columns for rows, columns in dims)


def partition_bytes(elements: int, weight_bytes: int) -> int:
    """Masters and two moments in float32, and the weights as they are computed with."""
    return elements * (3 * 4 + weight_bytes)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_holds_what_trains_and_no_more(said, stage: int) -> None:
    step = step_of(said[0] / f"sync-{stage}")
    for path in (step / manifests.PARTITIONS).glob("*_model_states.pt"):
        names = load_torch_file(path)["module"]
        assert names and all(".lora_" in name for name in names), "a frozen tensor, such as the tied head"
    sizes = {name: entry["size"] for name, entry in manifests.read_manifest(step)["files"].items()}
    stored = sum(size for name, size in sizes.items() if name.startswith(manifests.PARTITIONS))
    tensors = len(PROJECTIONS) * 2 * SHAPES["scenes"].layers
    described = 2000 * tensors  # names and shapes, in the files of both ranks
    bound = partition_bytes(adapter_elements("scenes"), 4)
    assert bound * (0.7 if stage == 3 else 1) < stored < bound + described
    assert {"processor/preprocessor_config.json", "processor/qwenvl_dist.json"} <= set(sizes)


@pytest.mark.parametrize(("shape", "limit"), [("2b", 200e6), ("7b", 400e6)])
def test_the_true_shapes_make_small_checkpoints(said, shape: str, limit: float) -> None:
    tokenizer = 20e6
    tensors = len(PROJECTIONS) * 2 * SHAPES[shape].layers
    ranks = 8
    assert partition_bytes(adapter_elements(shape), 2) + ranks * 1000 * tensors + tokenizer < limit
