"""`shards encode`: exact on any number of ranks, resumable; training on features learns what it learns on pictures."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.config import make_recipe
from qwenvl_dist.data.features import SampleFeatures, bad_members, read_features
from qwenvl_dist.data.index import FEATURES, Manifest, load_shard_index
from qwenvl_dist.data.sizes import ImageSizeRule, UnreadableImage
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.data.verify import verify
from qwenvl_dist.distributed import Topology
from qwenvl_dist.errors import UserError
from qwenvl_dist.model.tower import vision_fingerprint
from qwenvl_dist.training.encode import open_output
from qwenvl_dist.training.features import check_frozen
from qwenvl_dist.training.run import open_data, open_streams
from tests.made_shards import Members, jpeg, key_of, keys_of, record, stream, write_shards
from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, run_train, write_recipe

SIZES = (9, 1, 7, 7)
BAD = key_of(2, 3)
PIXELS = {"min_pixels": 784, "max_pixels": 6272}
# Features are rounded to 8 bits of mantissa, which moves losses by 2e-5 of their value; features of other pictures
# move them by 1e-3 and more.
TOLERANCE = 1e-4


def members_of(number: int) -> Members:
    """None, one, two or three pictures; one sample's picture is cut off."""
    images = number % 4
    names = ["jpg"] if images == 1 else [f"{image}.jpg" for image in range(images)]
    pictures = {name: jpeg(number + image, (56, 90, 40)[image]) for image, name in enumerate(names)}
    return {**pictures, "json": record("COCO Yes:", f"a circle above {number} squares", images=images)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = [[members_of(10 * shard + i) for i in range(size)] for shard, size in enumerate(SIZES)]
    shards[2][3] = {"jpg": jpeg(3)[:300], "json": record("COCO Yes:", "cut off")}
    return write_shards(tmp_path_factory.mktemp("pictures") / "shards", shards)


def run_encode(arguments: list[str], kill_rank: int | None = None) -> None:
    """One rank: encode; when told so die in the middle of the second shard."""
    from qwenvl_dist.__main__ import main
    from qwenvl_dist.training.encode import ShardEncoder

    encode, shards = ShardEncoder.encode, []

    def dying(self: ShardEncoder, entry: Any) -> Any:
        shards.append(entry)
        if len(shards) == 2:
            self.advance = lambda n: os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, entry)

    if kill_rank == int(os.environ["RANK"]):
        ShardEncoder.encode = dying  # type: ignore[method-assign]
    raise SystemExit(main(["shards", "encode", *arguments]))


def start_encode(pictures: Path, base: Path, out: Path, world: int, **options: Any) -> list[str]:
    area = f"{PIXELS['min_pixels']},{PIXELS['max_pixels']}"
    arguments = [str(pictures), "--base", str(base), "--out", str(out), "--image-size", area]
    arguments += ["--dtype", "float32", "--batch-size", "2"]
    target = "tests.training.test_encode:run_encode"
    return run_ranks(target, world, timeout=TIMEOUT, arguments=arguments, **options)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, pictures: Path, scenes_base: Path) -> Path:
    """The features of `pictures`, encoded by one process. Read only."""
    out = tmp_path_factory.mktemp("features") / "shards"
    start_encode(pictures, scenes_base, out, 1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.dist
def test_two_ranks_one_of_them_killed_write_what_one_process_writes(
    tmp_path: Path, pictures: Path, scenes_base: Path, features: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match="-9"):
        start_encode(pictures, scenes_base, out, 2, kill_rank=1)
    assert (out / "shard-000001.tar").exists() and not (out / "shard-000003.tar").exists()
    assert not (out / "manifest.json").exists()
    finished = (out / "shard-000001.tar").stat().st_ino
    start_encode(pictures, scenes_base, out, 2)
    assert contents(out) == contents(features)
    assert (out / "shard-000001.tar").stat().st_ino == finished


@pytest.mark.dist
def test_shards_keep_keys_texts_and_sizes(pictures: Path, features: Path) -> None:
    assert Manifest.load(features).packing["bad"][0]["key"] == BAD
    assert [(fault.key, fault.reason[:17]) for fault in verify(features).bad] == [(BAD, "cannot be decoded")]
    for entry in Manifest.load(pictures).shards:
        before = load_shard_index(pictures / f"{entry.name}.idx")
        after = load_shard_index(features / f"{entry.name}.idx")
        assert after.keys == before.keys
        assert after.image_sizes.tolist() == before.image_sizes.tolist()
        assert after.image_starts.tolist() == before.image_starts.tolist()
        assert after.caption_lengths.tolist() == before.caption_lengths.tolist()
        crcs = [[index.members(i)["json"].crc32 for i in range(len(index))] for index in (before, after)]
        assert crcs[0] == crcs[1]


@pytest.mark.dist
def test_batches_of_features_hold_no_picture_and_no_dummy(
    features: Path, pictures: Path, scenes_processor: Any
) -> None:
    rule = ImageSizeRule(None, *PIXELS.values())
    encoder = SampleEncoder(scenes_processor, rule, 256, features_width=96)
    batches = [batch for step in stream(features, encoder, workers=2).iterate() for batch in step]
    plain = stream(pictures, SampleEncoder(scenes_processor, rule, 256))
    assert [key for batch in batches for key in batch.keys] == keys_of(plain.iterate())
    for batch in batches:
        assert batch.features is not None and batch.features.dtype == torch.bfloat16
        assert batch.features.shape == (len(batch.image_positions), 96)
        assert len(batch.input_ids) == 3 and not len(batch.pixels)
    assert [bad.key for batch in batches for bad in batch.bad] == [BAD]


def run_without_tower(recipe: str) -> None:
    """One rank: train with a tower that must not be called."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    from qwenvl_dist.model.fast_path import FrozenTower

    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the vision tower was called")

    FrozenTower.forward = Qwen2VisionTransformerPretrainedModel.forward = forbidden  # type: ignore[assignment]
    run_train(recipe)


@pytest.fixture(scope="module")
def start_run(tmp_path_factory: pytest.TempPathFactory, scenes_base: Path) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("runs")

    def start(name: str, shards: Path, world: int, stage: int, target: str, **sections: Any) -> Path:
        out = folder / name
        if not out.exists():
            data = {"image_size": PIXELS, "micro_batch_size": 2}
            steps = {"max_steps": None, "epochs": 1, "grad_accum_steps": 4 // world}
            recipe = write_recipe(
                folder / f"{name}.yaml", scenes_base, shards, out, stage,
                **{"lora": {"dropout": 0.0}, "data": data, "train": steps, **sections},
            )  # fmt: skip
            run_ranks(target, world, timeout=TIMEOUT, recipe=str(recipe))
        return out

    return start


@pytest.mark.dist
@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_features_teach_what_pictures_teach(
    start_run: Callable[..., Path], pictures: Path, features: Path, world: int, stage: int
) -> None:
    straight = start_run("pictures", pictures, 1, 2, "tests.training.runs:run_train")
    target = "tests.training.test_encode:run_without_tower"
    run = start_run(f"features-{world}", features, world, stage, target)
    assert len(losses(run)) == 3
    assert ledger(run) == ledger(straight)
    assert losses(run) == pytest.approx(losses(straight), rel=TOLERANCE)
    assert losses(run) != losses(straight)
    bad = [[line["key"] for line in read_lines(out / "bad_samples.jsonl")] for out in (run, straight)]
    assert bad[0] == bad[1] == [BAD]


@pytest.mark.dist
def test_a_tower_that_trains_is_refused(start_run: Callable[..., Path], features: Path) -> None:
    target, model = "tests.training.runs:run_train", {"train": ["merger"]}
    with pytest.raises(AssertionError, match=r"features of a frozen vision tower, but \d+ of its parameters"):
        start_run("merger", features, 1, 2, target, model={"dtype": "float32", **model})


def test_an_adapter_on_the_tower_is_refused_and_one_on_the_language_is_not() -> None:
    recipe = make_recipe({"data": {"train": "here"}}, "test")
    check_frozen(recipe, ["base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"])
    with pytest.raises(UserError, match=r"data\.train = here: holds features of a frozen vision tower"):
        check_frozen(recipe, ["base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight"])


def changed(base: Path, folder: Path, part: str) -> Path:
    """Copy a base with one tensor of a part changed."""
    shutil.copytree(base, folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name and tensors[name].ndim == 2)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_fingerprint_is_of_the_tower_alone(tmp_path: Path, scenes_base: Path) -> None:
    ours = vision_fingerprint(scenes_base)
    assert vision_fingerprint(changed(scenes_base, tmp_path / "language", "layers")) == ours
    assert vision_fingerprint(changed(scenes_base, tmp_path / "vision", "visual")) != ours
    config = json.loads((tmp_path / "language" / "config.json").read_text())
    config["vision_config"]["num_heads"] //= 2
    (tmp_path / "language" / "config.json").write_text(json.dumps(config))
    assert vision_fingerprint(tmp_path / "language") != ours


@pytest.mark.dist
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"image_size": 56},
            "features of image_size {'min_pixels': 784, 'max_pixels': 6272}, this run has 56",
        ),
        ({"image_size": PIXELS, "resize": "exact"}, "features of resize fast, this run has exact; set data"),
    ],
)
def test_features_of_other_settings_are_refused(
    features: Path, scenes_base: Path, scenes_processor: Any, data: dict[str, Any], message: str
) -> None:
    recipe = make_recipe({"data": {"train": str(features), **data}}, "test")
    with pytest.raises(UserError) as caught:
        open_streams(*open_data(recipe), Topology(0, 0, 0, 1), scenes_processor, scenes_base)
    assert str(caught.value).startswith(f"data.train = {features}: holds {message}")


@pytest.mark.dist
def test_features_of_another_tower_are_refused(
    tmp_path: Path, features: Path, pictures: Path, scenes_base: Path, scenes_processor: Any
) -> None:
    other = changed(scenes_base, tmp_path / "other", "visual")
    places = {"train": str(pictures), "validation": str(features)}
    recipe = make_recipe({"data": {**places, "image_size": PIXELS}}, "test")
    with pytest.raises(
        UserError, match=r"data\.validation = .*: holds features of the vision tower \w{12}, "
    ):
        open_streams(*open_data(recipe), Topology(0, 0, 0, 1), scenes_processor, other)
    train, validation, _ = open_streams(
        *open_data(recipe), Topology(0, 0, 0, 1), scenes_processor, scenes_base
    )
    assert validation is not None
    assert (train.encoder.features_width, validation.encoder.features_width) == (None, 96)


@pytest.mark.dist
def test_a_folder_of_other_settings_or_data_is_not_written_to(tmp_path: Path, features: Path) -> None:
    before = contents(features)
    manifest = Manifest.load(features)
    asked = {**(manifest.features or {}), **manifest.packing}
    for key, value in {"vision": "0" * 64, "image_size": 56, "source": "another"}.items():
        with ExitStack() as stack, pytest.raises(UserError, match=f"was encoded with {key} .*, now it is"):
            open_output(features, {**asked, key: value}, stack)
    assert contents(features) == before
    (tmp_path / "notes.txt").write_text("mine")
    with ExitStack() as stack, pytest.raises(UserError, match=r"holds other data \(notes\.txt\)"):
        open_output(tmp_path, asked, stack)


@pytest.mark.dist
def test_what_needs_pictures_refuses_features(features: Path) -> None:
    with pytest.raises(UserError, match="holds vision features, this needs pictures"):
        ShardSet(features).require_pictures()


def test_members_are_read_back_and_damage_is_named() -> None:
    made = SampleFeatures(torch.randn(4, 6).bfloat16(), [[70, 60]], ((1, 4, 4),))
    members = made.to_members()
    again = read_features(members)
    assert torch.equal(again.values, made.values)
    assert (again.sizes, again.grids) == (made.sizes, made.grids)
    again.check_shape(6, 2)
    with pytest.raises(ValueError, match=r"of shape \(4, 6\), the model takes \(4, 8\)"):
        again.check_shape(8, 2)
    with pytest.raises(ValueError, match="features: 47 bytes"):
        read_features({**members, FEATURES: members[FEATURES][:-1]})
    with pytest.raises(ValueError, match=r"features\.json: missing member"):
        read_features({FEATURES: members[FEATURES]})
    with pytest.raises(ValueError, match=r"features\.json: damaged"):
        read_features({**members, "features.json": b'{"sizes": [[1]]}'})
    with pytest.raises(UnreadableImage, match="not a picture"):
        read_features(bad_members([[70, 60]], "not a picture"))
    assert not SampleFeatures(torch.empty(0, 6)).to_members()
    assert read_features({}).grids == ()
