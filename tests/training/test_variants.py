"""Every kind of adapter trained on real ranks, merged, and compared with peft's own merge of the same adapter."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from qwenvl_dist.errors import UserError
from qwenvl_dist.evaluate.captioner import add_adapter
from qwenvl_dist.merge.merge import merge, write_adapter
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model.base_folder import BaseFolder
from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, adapter, assert_same_adapter, losses, write_recipe

STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora-patterns-plus": {
        "lora": {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 4, "layers.1.mlp.(up|down)_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.[kv]_proj": 4},
        },
        "optim": {"lora_plus_ratio": 8},
    },
    "dora": {"lora": {"use_dora": True, "dropout": 0.1}},
    "tower-and-merger": {
        "lora": {
            "target_modules": ["q_proj", "qkv", "proj", "fc1", "merger.mlp.0", "merger.mlp.2"],
            "rank_pattern": {"visual.*": 2},
        },
        "optim": {"learning_rates": {"vision": 2e-3, "merger": 3e-3}},
    },
    "dora-and-copies": {
        "lora": {
            "use_dora": True,
            "target_modules": ["q_proj", "down_proj", "fc2"],
            "modules_to_save": ["merger", "lm_head", "embed_tokens"],
        },
    },
}
RESUMED = "dora-and-copies"
CASES = [(name, stage) for stage in (2, 3) for name in VARIANTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, scenes_base: Path) -> Path:
    """`scenes_base` in float32, its head its own."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("variants") / "base"
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(scenes_base, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(scenes_base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path, scene_shards: Path) -> Path:
    """A folder with a run of three steps a case, on two ranks; and the third step again, resumed."""
    folder = tmp_path_factory.mktemp("variant-runs")
    recipes = []
    for name, stage in CASES:
        sections = {key: dict(section) for key, section in VARIANTS[name].items()}
        sections["lora"] = {"dropout": 0.0, **sections["lora"]}
        sections["optim"] = {
            "learning_rate": 5e-3, "schedule": "constant", "warmup_ratio": 0.0, **sections.get("optim", {}),
        }  # fmt: skip
        train: dict[str, Any] = {"max_steps": STEPS, "grad_accum_steps": 1}
        train["checkpoint_every_steps"] = STEPS - 1 if name == RESUMED else STEPS

        def recipe(run: Path, stage: int = stage, train: Any = train, sections: Any = sections) -> Path:
            path = run.with_suffix(".yaml")
            data = {"workers": 0}
            return write_recipe(path, base, scene_shards, run, stage, train=train, data=data, **sections)

        run = folder / f"{name}-{stage}"
        recipes.append(recipe(run))
        if name == RESUMED:
            train["resume"] = str(step_of(run, STEPS - 1))
            recipes.append(recipe(folder / f"{name}-{stage}-resumed"))
    run_ranks("tests.training.runs:run_several", 2, timeout=TIMEOUT, recipes=[str(path) for path in recipes])
    return folder


def step_of(run: Path, step: int = STEPS) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def load(folder: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    """Of a prompt with a picture of 2 x 2 visual tokens."""
    config = getattr(model, "base_model", model).config
    image = config.image_token_id
    ids = torch.tensor(
        [[5, config.vision_start_token_id, *[image] * 4, config.vision_end_token_id, 7, 8, 9, 6]]
    )
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(ids == image).int(),
        ).logits


@pytest.mark.dist
@pytest.mark.parametrize(("name", "stage"), CASES)
def test_trained_variants_merge_as_peft_merges_them(
    runs: Path, base: Path, tmp_path: Path, name: str, stage: int
) -> None:
    run = runs / f"{name}-{stage}"
    assert len(losses(run)) == STEPS
    trained = read_trained(step_of(run))
    report = merge(trained, BaseFolder(base), tmp_path / "out", verify=True)
    assert report.merged == len(trained.deltas) + len(trained.parameters)
    assert all(line["changed"] > 0.01 for line in report.modules)
    write_adapter(trained, tmp_path / "adapter")

    tuned = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert peft.get_peft_model_state_dict(tuned).keys() == stored.keys()
    expected, theirs = logits(tuned), tuned.merge_and_unload()
    merged = load(tmp_path / "out")
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(
            merged.state_dict()[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(add_adapter(load(base), tmp_path / "adapter")), expected)
    assert (expected - logits(load(base))).abs().max() > 1e-2


@pytest.mark.dist
@pytest.mark.parametrize("name", VARIANTS)
def test_both_stages_learn_the_same(runs: Path, name: str) -> None:
    two, three = (runs / f"{name}-{stage}" for stage in (2, 3))
    assert losses(two) == pytest.approx(losses(three), rel=2e-5)
    ours, theirs = adapter(two, STEPS), adapter(three, STEPS)
    assert ours.keys() == theirs.keys()
    for (
        key,
        tensor,
    ) in ours.items():  # by norm: where a gradient is all rounding, Adam makes a whole step of it
        assert (tensor - theirs[key]).norm() <= 1e-3 * tensor.norm(), key


@pytest.mark.dist
@pytest.mark.parametrize("stage", (2, 3))
def test_a_resumed_variant_goes_on_as_if_nothing_had_happened(runs: Path, stage: int) -> None:
    straight, resumed = runs / f"{RESUMED}-{stage}", runs / f"{RESUMED}-{stage}-resumed"
    assert losses(resumed) == pytest.approx(losses(straight)[-1:], rel=1e-6)
    assert_same_adapter(adapter(straight, STEPS), adapter(resumed, STEPS), 1e-6)


@pytest.mark.dist
def test_the_checkpoint_holds_what_the_variant_trains(runs: Path) -> None:
    names = {name.removeprefix("base_model.model.") for name in adapter(runs / "dora-and-copies-3", STEPS)}
    layer = "model.language_model.layers.0.self_attn.q_proj"
    assert {f"{layer}.lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector")} <= names
    assert {"lm_head.modules_to_save.default.weight",
            "model.visual.merger.modules_to_save.default.ln_q.weight"} <= names  # fmt: skip
    config = json.loads((step_of(runs / "dora-and-copies-3") / "adapter_config.json").read_text())
    assert config["use_dora"] and set(config["modules_to_save"]) == {"merger", "lm_head", "embed_tokens"}
    # `proj` is also the end of the patch embedding's name, a convolution
    config = json.loads((step_of(runs / "tower-and-merger-2") / "adapter_config.json").read_text())
    assert config["exclude_modules"] == ["model.visual.patch_embed.proj"]


CHANGED = {
    "use_dora": {"use_dora": False},
    "use_rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 4}},
    "modules_to_save": {"modules_to_save": ["merger", "lm_head"]},
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_resume_with_another_variant_is_refused(key: str) -> None:
    from qwenvl_dist.config import LoraConfig
    from qwenvl_dist.training.checkpoint import require_same_adapter

    lora = LoraConfig.model_validate(VARIANTS[RESUMED]["lora"])
    written = lora.model_dump(mode="json")
    require_same_adapter(written, lora, "step-1")
    with pytest.raises(UserError, match=f"^lora.{key} = .*: the checkpoint step-1 was trained with"):
        require_same_adapter(written, lora.model_copy(update=CHANGED[key]), "step-1")
    older = {
        name: written[name] for name in ("rank", "alpha")
    }  # of a checkpoint from before there were variants
    require_same_adapter(older, LoraConfig(), "step-1")
