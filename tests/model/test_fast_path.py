"""The fast path against the plain modules of transformers and peft: values, gradients, and what is left undone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2VLForConditionalGeneration

from qwenvl_dist.config import PROJECTIONS, LoraConfig, ModelConfig
from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model import fast_path, fused, head
from qwenvl_dist.model.lora import make_trainable, set_activation_checkpointing
from qwenvl_dist.model.pixels import PixelSettings
from tests.model.made_batches import (
    CONFIG,
    LORA,
    batch_of,
    gradients,
    library_inputs,
    loss_model,
    randomise,
)


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fast_model(
    base: Path,
    settings: PixelSettings,
    lora: LoraConfig | None = LORA,
    config: ModelConfig = CONFIG,
    every: int = 0,
    partitioned: bool = False,
) -> Any:
    model = loss_model(base, lora, config, pixel_settings=settings)
    fast_path.install(base_of(model), partitioned)
    set_activation_checkpointing(base_of(model), every)
    return model


def assert_same(
    ours: tuple[torch.Tensor, dict[str, torch.Tensor]], theirs: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[1][name] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=name)


def run(model: Any, batch: CaptionBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(batch=batch)
    return loss.detach(), gradients(model, loss)


# --- values ---


@pytest.mark.parametrize("every", [0, 2, 1], ids=["none", "every_2", "all"])
@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("partitioned", [False, True], ids=["fused", "partitioned"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    scenes_base: Path,
    batch: CaptionBatch,
    encoder: SampleEncoder,
    settings: PixelSettings,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    chunk: int,
    partitioned: bool,
) -> None:
    monkeypatch.setattr(head, "CHUNK_TARGETS", chunk)
    library = Qwen2VLForConditionalGeneration.from_pretrained(scenes_base, dtype=torch.float32)
    library = randomise(make_trainable(library, LORA, CONFIG))
    loss = library(**library_inputs(batch, encoder, settings)).loss * batch.target_tokens
    model = fast_model(scenes_base, settings, every=every, partitioned=partitioned)
    assert fast_path.is_fused(base_of(model).model.language_model)
    assert_same(run(model, batch), (loss.detach(), gradients(library, loss)))


@pytest.mark.parametrize("targets", [("q_proj",), ("up_proj", "down_proj"), PROJECTIONS[:6]])
def test_layers_with_fewer_adapters_are_equal_too(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings, targets: tuple[str, ...]
) -> None:
    lora = LORA.model_copy(update={"target_modules": targets})
    plain = loss_model(scenes_base, lora, pixel_settings=settings)
    assert_same(run(fast_model(scenes_base, settings, lora), batch), run(plain, batch))


@pytest.mark.parametrize("parts", [("vision",), ("merger",), ("vision", "merger")])
def test_a_tower_that_trains_gets_its_gradients(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings, parts: Any
) -> None:
    config = CONFIG.model_copy(update={"train": parts})
    plain = loss_model(scenes_base, LORA, config, pixel_settings=settings)
    assert_same(run(fast_model(scenes_base, settings, LORA, config), batch), run(plain, batch))


def test_an_adapter_on_the_tower_trains(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings
) -> None:
    lora = LORA.model_copy(update={"target_modules": ("qkv", "q_proj")})
    plain = loss_model(scenes_base, lora, pixel_settings=settings)
    ours = run(fast_model(scenes_base, settings, lora), batch)
    assert any(".visual." in name for name in ours[1])
    assert_same(ours, run(plain, batch))


@pytest.mark.parametrize("chunk", [256, 3])
def test_a_head_that_trains_gets_its_gradient(
    scenes_base: Path,
    batch: CaptionBatch,
    settings: PixelSettings,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(head, "CHUNK_TARGETS", chunk)
    config = CONFIG.model_copy(update={"train": ("language",)})  # the head is tied to the embedding
    plain = loss_model(scenes_base, None, config, pixel_settings=settings)
    ours = run(fast_model(scenes_base, settings, None, config), batch)
    assert "model.language_model.embed_tokens.weight" in ours[1]
    assert_same(ours, run(plain, batch))


def test_an_adapter_switched_off_is_the_base(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings
) -> None:
    model = fast_model(scenes_base, settings)
    with model.disable_adapter(), torch.no_grad():
        off = model(batch=batch)
    plain = loss_model(scenes_base, None, pixel_settings=settings)
    torch.testing.assert_close(off, plain(batch=batch), rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_target_gives_zero_gradients(
    scenes_base: Path, encoder: SampleEncoder, settings: PixelSettings
) -> None:
    loss, found = run(fast_model(scenes_base, settings), batch_of(encoder, encoder.dummy, encoder.dummy))
    assert loss.item() == 0
    assert len(found) == 28 and not any(gradient.any() for gradient in found.values())


def test_bfloat16_stays_as_close_to_float32_as_the_plain_modules(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings
) -> None:
    exact = loss_model(scenes_base, pixel_settings=settings)(batch=batch)
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    plain = loss_model(scenes_base, LORA, config, pixel_settings=settings)(batch=batch)
    ours = fast_model(scenes_base, settings, LORA, config)(batch=batch)
    assert (ours - exact).abs() <= (plain - exact).abs() + 2e-3 * exact


# --- dropout ---


def test_dropout_keeps_its_share_of_the_elements() -> None:
    torch.manual_seed(0)
    bits = fused.keep_mask((301, 997), 0.1, torch.device("cpu"))
    assert bits.dtype == torch.int16 and bits.shape == (301, 997) and set(bits.unique().tolist()) == {-1, 0}
    mask = bits.bool()
    assert abs(mask.float().mean().item() - 0.9) < 5 * (0.09 / mask.numel()) ** 0.5
    assert abs(mask[:, 1:].logical_xor(mask[:, :-1]).float().mean().item() - 0.18) < 0.005
    torch.manual_seed(0)
    again = fused.keep_mask((301, 997), 0.1, torch.device("cpu"))
    assert torch.equal(bits, again)


def test_dropout_gradients_are_those_of_autograd_under_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    masks = [torch.rand(6, width, generator=generator) > 0.3 for width in (5, 5, 7)]
    drawn = iter(masks)
    monkeypatch.setattr(fused, "keep_mask", lambda shape, rate, device: -next(drawn).short())
    x = tensor(2, 3, 5)
    parts = [
        fused.Projection(tensor(o, i).detach(), None, tensor(2, i), tensor(o, 2), scaling=0.5)
        for o, i in ((7, 5), (7, 5), (5, 7))
    ]

    def plain(x: torch.Tensor, number: int, rate: float) -> torch.Tensor:
        part = parts[number]
        assert part.lora_A is not None and part.lora_B is not None
        kept = x * masks[number] / (1 - rate)
        return x @ part.weight.T + part.scaling * (kept @ part.lora_A.T @ part.lora_B.T)

    flat = x.reshape(6, 5)
    inner = torch.nn.functional.silu(plain(flat, 0, 0.3)) * plain(flat, 1, 0.1)
    expected = plain(inner, 2, 0.2).view(2, 3, 5)
    ours = fused.lora_swiglu(x, parts, (0.3, 0.1, 0.2))
    torch.testing.assert_close(ours, expected)
    trained: list[Any] = [x, *(t for part in parts for t in (part.lora_A, part.lora_B))]
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), trained),
        torch.autograd.grad((expected * weight).sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("every", [2, 1])
def test_layers_recomputed_or_left_as_modules_draw_the_same_masks(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings, every: int
) -> None:
    lora = LORA.model_copy(update={"dropout": 0.3})
    results = []
    for mode, partitioned in ((0, False), (every, False), (0, True)):
        model = fast_model(scenes_base, settings, lora, every=mode, partitioned=partitioned)
        torch.manual_seed(5)
        results.append(run(model, batch))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])  # ZeRO-2 and ZeRO-3 learn the same
    without = run(fast_model(scenes_base, settings), batch)
    assert not torch.allclose(without[0], results[0][0], rtol=1e-4)


# --- kernels ---


@pytest.mark.parametrize("targets", [0, 1, 5, 40])
def test_chunked_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, targets: int) -> None:
    monkeypatch.setattr(head, "CHUNK_TARGETS", 16)
    torch.manual_seed(0)
    layer = head.TargetLossHead(8, 50, bias=False)
    layer.weight.data *= 20
    hidden, ids = torch.randn(targets, 8, requires_grad=True), torch.randint(0, 50, (targets,))
    ours, theirs = (
        3 * layer(hidden, ids),
        3 * cross_entropy(layer(hidden).float(), ids, reduction="sum"),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    inputs = (hidden, layer.weight)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_attention_by_products_is_scaled_dot_product_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (6, 2, 2))
    ours = fused.attend_by_products(q, k, v, fast_path.causal_bias(9, torch.float32), 0.3)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for mine, expected in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_the_frozen_tower_gives_transformers_features(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings
) -> None:
    model = base_of(fast_model(scenes_base, settings))
    ours = model.vision_features(batch)
    model.model.visual.__class__ = fast_path.FrozenTower.__mro__[1]
    torch.testing.assert_close(ours, model.vision_features(batch), rtol=1e-5, atol=1e-5)


# --- what is left undone ---


class LargestTensor(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("targets", [64, 256])
def test_no_tensor_of_targets_by_vocabulary_exists(monkeypatch: pytest.MonkeyPatch, targets: int) -> None:
    monkeypatch.setattr(head, "CHUNK_TARGETS", 8)
    layer = head.TargetLossHead(4, 1000, bias=False).requires_grad_(False)
    hidden, ids = torch.randn(targets, 4, requires_grad=True), torch.randint(0, 1000, (targets,))
    with LargestTensor() as largest:
        layer(hidden, ids).backward()
    assert largest.elements == 8 * 1000


def test_the_last_layer_works_at_targets_alone(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings
) -> None:
    model = fast_model(scenes_base, settings)
    rows = []
    for layer in base_of(model).model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][..., 0].numel()))
    model(batch=batch)
    assert rows == [batch.input_ids.numel(), batch.target_tokens]


@pytest.mark.parametrize("every", [0, 2, 1], ids=["none", "every_2", "all"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
def test_a_frozen_tower_keeps_nothing(
    scenes_base: Path, batch: CaptionBatch, settings: PixelSettings, every: int, fast: bool, hooked: bool
) -> None:
    model = loss_model(scenes_base, pixel_settings=settings)
    base = base_of(model)
    if fast:
        fast_path.install(base, False)
    if hooked:
        model.enable_input_require_grads()
    set_activation_checkpointing(base, every)
    inside: list[bool] = []
    saved, outputs, runs = [], [], []
    tower = base.model.visual
    tower.register_forward_pre_hook(lambda *_: inside.append(True))

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output)
        inside.clear()

    tower.register_forward_hook(leave)
    tower.merger.register_forward_pre_hook(lambda *_: runs.append(1))

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(bool(inside))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch=batch).backward()
    assert saved and not any(saved)
    assert [output.pooler_output.requires_grad for output in outputs] == [False]
    assert len(runs) == 1  # nor is it run again in the backward pass


# --- where it does not apply ---


def test_a_decoder_that_trains_keeps_its_modules(scenes_base: Path, settings: PixelSettings) -> None:
    config = CONFIG.model_copy(update={"train": ("language",)})
    model = fast_model(scenes_base, settings, None, config)
    assert not fast_path.is_fused(model.model.language_model)
    assert isinstance(model.model.visual, fast_path.FrozenTower)


def test_a_tower_that_trains_keeps_its_class(scenes_base: Path, settings: PixelSettings) -> None:
    config = CONFIG.model_copy(update={"train": ("merger",)})
    base = base_of(fast_model(scenes_base, settings, LORA, config))
    assert not isinstance(base.model.visual, fast_path.FrozenTower)
    assert fast_path.is_fused(base.model.language_model)
