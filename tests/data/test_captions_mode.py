"""`shards pack --captions-mode`: a word in the manifest, which a recipe that says nothing goes by."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwenvl_dist.config import Recipe, make_recipe
from qwenvl_dist.data.captions import PackedCaptions, as_packed
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.errors import UserError
from qwenvl_dist.planning.samples import look_at
from tests.data.made_coco import make_coco
from tests.ranks import command


def packed(folder: Path, *options: str) -> Path:
    coco = make_coco(folder / "coco", 3)
    command(
        "shards", "pack", "--source", "coco", "--captions", coco.captions, "--images", coco.images,
        "--out", folder / "shards", "--samples-per-shard", "2", *options,
    )  # fmt: skip
    return folder / "shards"


def repack(folder: Path, *options: str, code: int = 0) -> str:
    coco = folder / "coco"
    done = command(
        "shards", "pack", "--source", "coco", "--captions", coco / "captions.json", "--images", coco / "images",
        "--out", folder / "shards", "--samples-per-shard", "2", *options, code=code,
    )  # fmt: skip
    return done.stderr


def data_of(recipe: Recipe) -> tuple[str | None, str | None]:
    return recipe.data.captions_mode, recipe.data.caption_mark


def recipe_of(*places: Path, **keys: str) -> Recipe:
    sets = [{"name": place.parent.name, "train": str(place), "epochs": 1} for place in places]
    data = {"train": str(places[0])} if len(places) == 1 else {"mixture": sets}
    return make_recipe({"data": {**data, **keys}}, "test")


def filled(recipe: Recipe, *places: Path) -> tuple[str | None, str | None]:
    return data_of(as_packed(recipe, [Manifest.load(place) for place in places]))


def test_another_mode_changes_the_manifest_alone(tmp_path: Path) -> None:
    shards = packed(tmp_path, "--join", " | ")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards.iterdir()}
    fingerprint = Manifest.load(shards).fingerprint
    assert filled(recipe_of(shards), shards) == ("join", " | ")
    said = repack(tmp_path, "--join", " | ", "--captions-mode", "sample")
    assert "all 2 shards are there" in said
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards.iterdir()}
    assert [name for name in after if after[name] != before[name]] == ["manifest.json"]
    assert Manifest.load(shards).fingerprint == fingerprint
    assert json.loads((shards / "manifest.json").read_text())["captions"] == {"mark": " | ", "mode": "sample"}
    assert filled(recipe_of(shards), shards) == ("sample", " | ")
    command("shards", "verify", shards)
    repack(tmp_path, "--join", " | ")
    assert Manifest.load(shards).captions == PackedCaptions(" | ")


def test_what_the_recipe_says_comes_first(tmp_path: Path) -> None:
    shards = packed(tmp_path, "--captions-mode", "each")
    assert filled(recipe_of(shards), shards) == ("each", "&&")
    said = recipe_of(shards, captions_mode="join", caption_mark="##")
    assert filled(said, shards) == ("join", "##")
    made = make_recipe({"data": {"train": str(shards)}, "model": {"attention": "flash_attention_2"}}, "test")
    with pytest.raises(UserError, match="each needs a mask, which flash_attention_2 does not take"):
        filled(made, shards)


def test_indexed_shards_say_it_too(tmp_path: Path) -> None:
    shards = packed(tmp_path)
    for path in (*shards.glob("*.idx"), shards / "manifest.json"):
        path.unlink()
    command("shards", "index", shards, "--captions-mode", "each")
    assert Manifest.load(shards).captions == PackedCaptions("&&", "each")
    indexed = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.idx")}
    command("shards", "index", shards, "--captions-mode", "sample")
    assert Manifest.load(shards).captions == PackedCaptions("&&", "sample")
    assert indexed == {path.name: path.stat().st_mtime_ns for path in shards.glob("*.idx")}


def test_sets_that_say_nothing_follow_those_that_do(tmp_path: Path) -> None:
    one, two, three = (packed(tmp_path / name) for name in ("one", "two", "three"))
    repack(tmp_path / "one", "--captions-mode", "each")
    boxes = replace(Manifest.load(two), captions=PackedCaptions())  # as grounding is packed
    boxes.write(two)
    assert filled(recipe_of(one, two), one, two) == ("each", "&&")
    repack(tmp_path / "three", "--captions-mode", "sample")
    with pytest.raises(UserError) as caught:
        filled(recipe_of(one, three), one, three)
    assert "data.mixture one = " in str(caught.value) and "was packed with captions_mode each" in str(
        caught.value
    )
    assert str(caught.value).endswith("with sample: say in data.captions_mode which one the run takes")
    assert filled(recipe_of(one, three, captions_mode="join"), one, three) == ("join", "&&")


def test_two_marks_matter_only_where_texts_are_split(tmp_path: Path) -> None:
    one, two = packed(tmp_path / "one"), packed(tmp_path / "two", "--join", "##")
    assert filled(recipe_of(one, two), one, two) == ("join", "&&")
    with pytest.raises(UserError, match=r"with caption_mark && and .* with ##: say in data\.caption_mark"):
        filled(recipe_of(one, two, captions_mode="sample"), one, two)


def test_the_plan_goes_by_the_manifest(tmp_path: Path) -> None:
    shards = packed(tmp_path, "--captions-mode", "each")
    assert look_at(recipe_of(shards), 1)[0].largest.segmented
    assert not look_at(recipe_of(shards, captions_mode="join"), 1)[0].largest.segmented


def test_a_mode_that_does_not_exist_is_a_damaged_manifest(tmp_path: Path) -> None:
    shards = packed(tmp_path, "--captions-mode", "each")
    text = (shards / "manifest.json").read_text()
    for wrong in ('"most"', "3"):
        (shards / "manifest.json").write_text(text.replace('"each"', wrong))
        with pytest.raises(UserError, match=r"manifest\.json: damaged .*: restore it, or pack again"):
            Manifest.load(shards)


def test_boxes_are_no_captions(tmp_path: Path) -> None:
    done = command(
        "shards", "pack", "--source", "grounding", "--instances", "i.json", "--images", tmp_path,
        "--out", tmp_path / "out", "--captions-mode", "each", code=2,
    )  # fmt: skip
    assert "--captions-mode does not go with --source grounding" in done.stderr
