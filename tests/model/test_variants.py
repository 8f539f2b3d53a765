"""Kinds of adapter: the fast path against the plain modules, what learns at which rate, names that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl_dist.config import LoraConfig, OptimConfig
from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.errors import UserError
from qwenvl_dist.model import fast_path
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.lora import make_trainable, trainable_parameters
from qwenvl_dist.model.pixels import PixelSettings
from qwenvl_dist.training.optim import make_optimizer
from tests.model.made_batches import CONFIG, LORA, gradients, loss_model

# What peft is given, and whether the decoder can be fused.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "rslora": ({"use_rslora": True}, True),
    "patterns": ({"rank_pattern": {"k_proj": 1, "1.mlp.*": 9}, "alpha_pattern": {"v_proj": 3}}, True),
    "dora": ({"use_dora": True}, False),
    "bias": ({"target_modules": ("q_proj", "v_proj", "qkv"), "lora_bias": True}, False),
    "tower-and-merger": ({"target_modules": ("proj", "merger.mlp.0", "up_proj")}, True),
    "saved-merger": ({"modules_to_save": ("merger",)}, True),
    "saved-norms": ({"modules_to_save": ("post_attention_layernorm", "language_model.norm")}, False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_fast_path_gives_the_loss_and_gradients_of_the_plain_modules(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings, name: str
) -> None:
    changes, fused = VARIANTS[name]
    lora = LORA.model_copy(update=changes)
    results = []
    for fast in (True, False):
        model = loss_model(scenes_base, lora, pixel_settings=settings)
        if fast:
            fast_path.install(model.get_base_model(), partitioned=False)
            assert fast_path.is_fused(model.get_base_model().model.language_model) == fused
        loss = model(batch=batch)
        results.append((loss.detach(), gradients(model, loss)))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for key, gradient in their_gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            our_gradients[key] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=key
        )


def test_a_head_with_an_adapter_or_a_copy_keeps_its_modules(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings
) -> None:
    for changes in ({"target_modules": ("lm_head",)}, {"modules_to_save": ("lm_head",)}):
        losses = []
        for fast in (True, False):
            model = load_model(scenes_base, CONFIG)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
            model.pixel_settings = settings
            trained = make_trainable(model, LORA.model_copy(update=changes), CONFIG)
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in trainable_parameters(trained).values():
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if fast:
                fast_path.install(model, partitioned=False)
            losses.append(trained(batch=batch))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_lora_plus_gives_every_b_its_multiple_of_the_rate_of_its_a(
    scenes_base: Path, ratio: float | None
) -> None:
    lora = LORA.model_copy(
        update={"target_modules": ("q_proj", "fc1"), "use_dora": True, "modules_to_save": ("merger",)}
    )
    model = make_trainable(load_model(scenes_base, CONFIG), lora, CONFIG)
    config = OptimConfig(
        learning_rate=1e-3, learning_rates={"vision": 1e-4}, lora_plus_ratio=ratio, weight_decay=0.1
    )
    optimizer = make_optimizer(model, config, {"zero_optimization": {"stage": 2}})
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    trained = trainable_parameters(model)
    assert len(groups) == len(trained)
    for name, parameter in trained.items():
        rate = (1e-4 if ".blocks." in name else 1e-3) * (ratio or 1 if ".lora_B." in name else 1)
        group = groups[id(parameter)]
        assert group["lr"] == pytest.approx(rate) and group["rate_factor"] == pytest.approx(rate / 1e-3)
        assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "rank-of-nothing": ({"rank_pattern": {"q_prj": 2}}, (), r"lora.rank_pattern: 'q_prj' matches no module that"),
    "alpha-of-no-target": ({"alpha_pattern": {"fc1": 2}}, (), r"lora.alpha_pattern: 'fc1' matches no module that"),
    "not-the-whole-end": ({"rank_pattern": {"q": 2}}, (), r"lora.rank_pattern: 'q' matches no module that"),
    "bias-without-base-bias": (
        {"target_modules": ("q_proj", "up_proj"), "lora_bias": True}, (), r"lora.lora_bias: .*up_proj has no bias",
    ),
    "saves-nothing": ({"modules_to_save": ("mergr",)}, (), r"lora.modules_to_save: 'mergr' matches no module"),
    "saves-more": (
        {"modules_to_save": ("norm",)}, (), r"'norm' also matches model.*layernorm for peft, .* name more of it",
    ),
    "saves-twice": (
        {"modules_to_save": ("merger", "merger.mlp.0")}, (), r"visual.merger.mlp.0 is a part of model.visual.merger",
    ),
    "tied-copy": ({"modules_to_save": ("lm_head",)}, (), r"lora.modules_to_save names lm_head, but this base ties"),
    "tied-embedding": ({"modules_to_save": ("embed_tokens",)}, (), r"names model.language_model.embed_tokens, but"),
    "tied-target": ({"target_modules": ("lm_head", "q_proj")}, (), r"lora.target_modules names lm_head, but this base"),
    "target-in-copy": (
        {"target_modules": ("q_proj", "merger.mlp.0"), "modules_to_save": ("merger",)}, (),
        r"'merger.mlp.0' matches no linear layer of the base outside lora.modules_to_save",
    ),
    "copy-of-trained-part": (
        {"modules_to_save": ("merger",)}, ("merger",), r"model.train names 'merger', of which lora.modules_to_save",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_say_something_else_are_refused_in_one_line(scenes_base: Path, case: str) -> None:
    changes, parts, message = REFUSED[case]
    lora = LoraConfig.model_validate(LORA.model_dump() | changes)
    with pytest.raises(UserError, match=message) as caught:
        make_trainable(load_model(scenes_base, CONFIG), lora, CONFIG.model_copy(update={"train": parts}))
    assert "\n" not in str(caught.value)
