"""The plan of a run, from config.json and manifest alone, beside the real model, stream and command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qwenvl_dist.config import make_recipe
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from qwenvl_dist.errors import UserError
from qwenvl_dist.model import fast_path, head
from qwenvl_dist.model.flops import step_work
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.lora import make_trainable
from qwenvl_dist.model.names import runtime_name
from qwenvl_dist.planning import activations, advice, plan
from qwenvl_dist.planning.samples import look_at
from qwenvl_dist.planning.shapes import parameters_of, read_config, shape_of
from qwenvl_dist.planning.zero import ZeroSettings
from qwenvl_dist.synthetic.base import SHAPES, base_config
from tests.ranks import ROOT, command


def recipe_of(base: Path, shards: Path, **sections: Any) -> Any:
    tree: dict[str, Any] = {"model": {"base": str(base)}, "data": {"train": str(shards), "image_size": 56}}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return make_recipe(tree, "test")


def config_folder(folder: Path, shape: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(base_config(SHAPES[shape])))
    return folder


# --- parameters ---


def test_the_published_7b_has_the_bytes_that_its_index_says(shared_data: Path) -> None:
    folder = shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    recipe = recipe_of(folder, Path("-"), lora=None, model={"base": str(folder), "train": ["merger"]})
    found = parameters_of(shape_of(read_config(str(folder)), str(folder)), recipe)
    assert 2 * sum(p.numel for p in found) == index["metadata"]["total_size"]
    assert {p.name for p in found} == {runtime_name(name) for name in index["weight_map"]}
    assert {p.part for p in found if p.trains} == {"merger"}


@pytest.mark.parametrize("shape", ["2b", "7b", "scenes"])
def test_both_layouts_of_a_config_say_the_same(tmp_path: Path, shape: str) -> None:
    old = base_config(SHAPES[shape])
    vision, tied = old["vision_config"], old["tie_word_embeddings"]
    text = {key: value for key, value in old.items() if key not in ("vision_config", "model_type")}
    new = {
        "model_type": "qwen2_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }
    assert shape_of(old, "-") == shape_of(new, "-") == SHAPES[shape]


@pytest.mark.parametrize(
    ("lora", "trained"),
    [
        ({}, ()),
        (
            {
                "rank": 3,
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"layers.0.mlp.down_proj": 5},
            },
            (),
        ),
        ({"target_modules": ["qkv", "fc2", "v_proj"]}, ()),
        ({"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, ()),
        ({"use_dora": True}, ()),
        ({"modules_to_save": ["merger"]}, ()),
        ({}, ("merger",)),
        (None, ("vision", "language")),
    ],
)
def test_what_trains_is_what_peft_and_the_recipe_train(scenes_base: Path, lora: Any, trained: Any) -> None:
    recipe = recipe_of(
        scenes_base, Path("-"), lora=lora, model={"base": str(scenes_base), "train": list(trained)}
    )
    model = make_trainable(load_model(scenes_base, recipe.model), recipe.lora, recipe.model)
    found = parameters_of(SHAPES["scenes"], recipe)
    real = list(model.parameters())
    assert sum(p.numel for p in found) == sum(p.numel() for p in real)
    ours = sorted(p.numel for p in found if p.trains)
    assert ours == sorted(p.numel() for p in real if p.requires_grad)


def test_a_target_that_matches_nothing_is_told(scenes_base: Path) -> None:
    recipe = recipe_of(scenes_base, Path("-"), lora={"target_modules": ["q_prj"]})
    with pytest.raises(
        UserError, match=r"lora\.target_modules: 'q_prj' matches no linear layer of the base; it has"
    ):
        parameters_of(SHAPES["scenes"], recipe)


def test_another_models_config_is_refused(tmp_path: Path, scene_shards: Path) -> None:
    folder = config_folder(tmp_path / "base", "scenes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    with pytest.raises(UserError, match="model_type 'llava'"):
        plan(recipe_of(folder, scene_shards), 1)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match="is not a Qwen2-VL's"):
        plan(recipe_of(folder, scene_shards), 1)
    with pytest.raises(UserError, match="neither a folder nor in the hub's cache"):
        plan(recipe_of(tmp_path / "none", scene_shards), 1)


# --- data ---


def test_steps_are_those_of_the_run_plan(scenes_base: Path, scene_shards: Path) -> None:
    train = {"epochs": 3, "grad_accum_steps": 2, "checkpoint_every_steps": 2, "keep_checkpoints": 1}
    made = plan(recipe_of(scenes_base, scene_shards, train=train), gpus=2, nodes=2, gpu_memory_gib=24)
    assert (made.world_size, made.data.global_batch_size) == (4, 32)
    assert (made.data.steps_per_epoch, made.data.total_steps) == (2, 4)  # 120 samples in steps of 32
    assert (made.checkpoints.written, made.checkpoints.on_disk) == (2, 2)
    few = plan(recipe_of(scenes_base, scene_shards, train={**train, "max_steps": 3}), 2, 2)
    assert (few.data.total_steps, few.data.total_samples, few.checkpoints.written) == (3, 96, 2)
    with pytest.raises(UserError, match=r"train.global_batch_size = 10: must be a multiple of"):
        plan(recipe_of(scenes_base, scene_shards, train={"global_batch_size": 10}), 3)


SIZES = {"square": 280, "range": {"min_pixels": 3136, "max_pixels": 200704}}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_lengths_padding_and_arithmetic_are_those_of_the_real_stream(
    photo_shards: Path, real_processor: Any, tiny_base: Path, size: Any
) -> None:
    recipe = recipe_of(tiny_base, photo_shards, data={"train": str(photo_shards), "image_size": size})
    facts, _ = look_at(recipe, 2)
    made = plan(recipe, 2)
    layout = StepLayout(2, 4, 4)
    rule = ImageSizeRule.of(recipe.data.picture_size, real_processor)
    encoder = SampleEncoder(real_processor, rule, 8192, exact_resize=False)
    shards = ShardSet(photo_shards)
    order = RunPlan(shards.manifest.shard_sizes, seed=0, window=64)
    config = load_model(tiny_base, recipe.model).config
    real = padded = targets = visual = flops = length = 0
    for rank in range(2):
        stream = CaptionStream(shards, order, layout, encoder, rank=rank, workers=0, length_grouping=True)
        for batch in (batch for step in stream.iterate() for batch in step):
            padded += batch.input_ids.numel()
            real += int((batch.input_ids != encoder.chat.pad_token).sum())
            targets += batch.target_tokens
            visual += len(batch.image_positions)
            length = max(length, batch.input_ids.shape[1])
            flops += step_work(config, batch, 8, recipe.lora.target_modules).flops
    dummies = 320 - 290  # the last step's empty slots
    assert facts.visual_tokens_per_sample == pytest.approx((visual - dummies) / 290)
    assert facts.target_tokens_per_sample == pytest.approx(targets / 290, rel=0.05)
    assert facts.tokens_per_sample == pytest.approx((real - dummies * 24) / 290, rel=0.03)
    assert facts.padding_share == pytest.approx(1 - real / padded, abs=0.02)
    assert facts.largest.length == pytest.approx(length, rel=0.1)
    assert made.arithmetic.flops_per_step / 32 == pytest.approx(flops / 290, rel=0.03)


def test_a_budget_bounds_the_largest_micro_batch(scenes_base: Path, photo_shards: Path) -> None:
    data = {"train": str(photo_shards), "image_size": SIZES["range"], "micro_batch_visual_tokens": 400}
    facts, _ = look_at(recipe_of(scenes_base, photo_shards, data=data), 2)
    assert facts.largest.visual_tokens <= 400
    free, _ = look_at(
        recipe_of(scenes_base, photo_shards, data={**data, "micro_batch_visual_tokens": None}), 2
    )
    assert free.largest.visual_tokens > 400


@pytest.mark.parametrize("over_length", ["cut", "drop", "shrink"])
def test_no_sample_is_longer_than_max_length(scenes_base: Path, photo_shards: Path, over_length: str) -> None:
    data = {
        "train": str(photo_shards),
        "image_size": SIZES["range"],
        "over_length": over_length,
        "max_length": 150,
    }
    facts, samples = look_at(recipe_of(scenes_base, photo_shards, data=data), 1)
    assert facts.largest.length == int(samples.length.max()) <= 150
    assert np.all(samples.visual + samples.targets <= samples.length)


def test_features_in_the_shards_let_the_tower_rest(
    scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    import shutil

    from qwenvl_dist.data.index import Manifest

    copy = Path(shutil.copytree(scene_shards, tmp_path / "features"))
    manifest = Manifest.load(copy)
    Manifest(manifest.shards, manifest.packing, {"hidden": 96}).write(copy)
    with_pictures, without = (plan(recipe_of(scenes_base, place), 1) for place in (scene_shards, copy))
    assert with_pictures.recipes.memory.activations.tower > without.recipes.memory.activations.tower == 0
    assert with_pictures.arithmetic.flops_per_step > without.arithmetic.flops_per_step


def test_what_has_no_index_is_left_out_of_the_estimate_and_told(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = Path(shutil.copytree(scene_shards, tmp_path / "shards"))
    first, *others = sorted(copy.glob("*.idx"))
    first.unlink()
    assert plan(recipe_of(scenes_base, copy), 1).data.shards_read == 3
    said = capfd.readouterr().err
    assert "left out of the estimate: 1 indexes, such as" in said and "shard-000000" in said
    for path in others:
        path.unlink()
    with pytest.raises(UserError, match="index is missing: pack again"):
        plan(recipe_of(scenes_base, copy), 1)


# --- memory and advice ---


def test_constants_are_those_of_the_model() -> None:
    assert activations.CHUNK_TARGETS == head.CHUNK_TARGETS
    assert activations.CPU_BLOCK == head._CPU_BLOCK
    assert activations.SHORT_SEQUENCE == fast_path.SHORT_SEQUENCE


def test_settings_of_a_deepspeed_file_are_read_with_deepspeeds_defaults() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 2, 3):
        ours, theirs = (
            ZeroSettings.of({"stage": stage}, 96),
            DeepSpeedZeroConfig.model_validate({"stage": stage}),
        )
        assert (ours.reduce_bucket, ours.overlap, ours.contiguous_gradients, ours.sub_group) == (
            theirs.reduce_bucket_size, theirs.overlap_comm, theirs.contiguous_gradients, theirs.sub_group_size
        )  # fmt: skip
        assert (ours.persistence, ours.prefetch, ours.max_live, ours.max_reuse) == (
            theirs.param_persistence_threshold, theirs.prefetch_bucket_size, theirs.max_live_parameters,
            theirs.max_reuse_distance,
        )  # fmt: skip
    automatic = ZeroSettings.of({"stage": 3, "reduce_bucket_size": "auto"}, 96)
    assert automatic.reduce_bucket == 96 * 96


def made_7b(tmp_path: Path, shards: Path, memory: float, gpus: int = 4, **sections: Any) -> Any:
    folder = config_folder(tmp_path / "7b", "7b")
    return plan(recipe_of(folder, shards, **sections), gpus, gpu_memory_gib=memory)


def test_the_fastest_that_fits_changes_with_the_gpu(tmp_path: Path, scene_shards: Path) -> None:
    assert made_7b(tmp_path / "a", scene_shards, 80).fastest.name == "ZeRO-2"
    small = made_7b(tmp_path / "b", scene_shards, 12)
    assert small.fastest.name == "ZeRO-3"
    said = " ".join(advice(small))
    assert "ZeRO-3 fits with" in said and "The recipe's own setting, ZeRO-2, lacks" in said
    full = made_7b(tmp_path / "c", scene_shards, 24, lora=None, model={"train": ["language"]})
    assert full.fastest.name == "ZeRO-2, optimizer on the host"


def test_where_nothing_fits_a_smaller_step_is_named(tmp_path: Path, scene_shards: Path) -> None:
    data = {"train": str(scene_shards), "image_size": 1120, "micro_batch_size": 16}
    made = made_7b(tmp_path, scene_shards, 10, data=data, gpus=8)
    assert made.fastest is None and made.largest_micro_batch is not None
    said = " ".join(advice(made))
    assert f"data.micro_batch_size={made.largest_micro_batch}" in said or "model.checkpointing=all" in said
    nothing = made_7b(tmp_path / "more", scene_shards, 2, gpus=1)
    assert "Not even one sample at a time" in " ".join(advice(nothing))


def test_what_the_recipe_names_is_marked(tmp_path: Path, scenes_base: Path, scene_shards: Path) -> None:
    own = ROOT / "ds_configs" / "zero3_least_memory.json"
    made = plan(recipe_of(scenes_base, scene_shards, deepspeed={"config": str(own)}), 2)
    assert made.recipes.name == "ZeRO-3, least memory"
    other = tmp_path / "mine.json"
    other.write_text(json.dumps({"zero_optimization": {"stage": 3, "sub_group_size": 1000}}))
    made = plan(recipe_of(scenes_base, scene_shards, deepspeed={"config": str(other)}), 2)
    assert made.recipes.name == "mine.json, the recipe's" and made.recipes.settings.sub_group == 1000
    other.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    with pytest.raises(UserError, match=r"zero_optimization\.stage = 1"):
        plan(recipe_of(scenes_base, scene_shards, deepspeed={"config": str(other)}), 2)


def test_parts_of_the_peak_add_up(scenes_base: Path, scene_shards: Path) -> None:
    for choice in plan(recipe_of(scenes_base, scene_shards), 4).choices:
        states, act = choice.memory.states, choice.memory.activations
        passes = max(choice.memory.passes.values())
        assert passes == act.peak
        held = states.weights + states.adapter + states.gradients + states.optimizer
        running = max(states.gathered + states.buffers + passes, states.update)
        assert choice.memory.peak == held + running + choice.memory.framework


# --- the command ---


def test_the_command_needs_no_torch(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(scenes_base, scene_shards).to_dict()))
    code = (
        "import sys, qwenvl_dist.__main__ as m; m.main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    arguments = ["plan", str(path), "--gpus", "2", "--gpu-memory", "24"]
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, *more],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["fastest"] == "ZeRO-2" and made["steps"]["total"] == 13
    assert made["parameters"]["adapter"]["trained"] == 27648
    assert sum(part["frozen"] for part in made["parameters"].values()) == 512448
    assert {choice["name"] for choice in made["choices"] if choice["recipes"]} == {"ZeRO-2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: must be GiB above 0"),
        (["--mfu", "1.5"], "--mfu 1.5: must be above 0 and at most 1"),
        (["--gpu", "Abacus"], "--gpu Abacus: its peak is not known"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(scenes_base, scene_shards).to_dict()))
    done = command("plan", path, *arguments, code=2)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
