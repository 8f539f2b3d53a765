"""The loss model against transformers' own forward, what trains in it, and which bases it loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from qwenvl_dist.config import LoraConfig
from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.chat import IGNORE
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.errors import UserError
from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.lora import make_trainable, set_activation_checkpointing, trainable_parameters
from qwenvl_dist.model.names import runtime_name
from qwenvl_dist.model.pixels import PixelSettings
from tests.model.made_batches import (
    CONFIG,
    LORA,
    batch_of,
    example,
    gradients,
    library_inputs,
    loss_model,
    randomise,
)

# --- the loss ---


def test_loss_and_gradients_are_those_of_transformers(
    scenes_base: Path, model: Any, batch: CaptionBatch, encoder: SampleEncoder, settings: PixelSettings
) -> None:
    library = Qwen2VLForConditionalGeneration.from_pretrained(scenes_base, dtype=torch.float32)
    library = randomise(make_trainable(library, LORA, CONFIG))
    theirs = library(**library_inputs(batch, encoder, settings)).loss * batch.target_tokens
    ours = model(batch=batch)
    assert ours.dtype == torch.float32 and ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = gradients(library, theirs)
    actual = gradients(model, ours)
    assert actual.keys() == expected.keys() and len(actual) == 2 * 2 * 7
    for name, gradient in actual.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_answers_that_are_not_learned_have_no_part_in_the_loss(
    scenes_base: Path, model: Any, encoder: SampleEncoder, settings: PixelSettings
) -> None:
    words = ("a red circle", "a blue square above a circle", "a green square")
    messages = [
        {"role": role, "content": [{"type": "text", "text": said}], **({"loss": False} if masked else {})}
        for answer, masked in zip(words, (True, True, False), strict=True)
        for role, said, masked in (("user", "a circle", False), ("assistant", answer, masked))
    ]
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    batch, whole = (
        batch_of(encoder, replace(example(encoder, "one", words[0]), chat=encoder.chat.encode(said, ())))
        for said in (messages, plain)
    )
    assert torch.equal(batch.input_ids, whole.input_ids)
    (row,) = torch.nonzero((batch.labels != IGNORE).any(dim=1)).flatten().tolist()
    ids, last = batch.input_ids[row].tolist(), encoder.chat.tokenizer(f"{words[-1]}<|im_end|>")["input_ids"]
    (start,) = (at for at in range(len(ids)) if ids[at : at + len(last)] == last)
    library = Qwen2VLForConditionalGeneration.from_pretrained(scenes_base, dtype=torch.float32)
    library = randomise(make_trainable(library, LORA, CONFIG))
    with torch.no_grad():
        logits = library(**library_inputs(batch, encoder, settings)).logits[row]
    by_hand = -sum(logits[at - 1].log_softmax(-1)[ids[at]] for at in range(start, start + len(last)))
    assert batch.target_tokens == len(last) < whole.target_tokens
    torch.testing.assert_close(model(batch=batch), by_hand, rtol=1e-5, atol=1e-5)


def test_sums_of_samples_alone_are_the_loss_of_the_batch(
    model: Any, batch: CaptionBatch, encoder: SampleEncoder
) -> None:
    answers = {"one": (56, 56), "two": (28, 84)}
    examples = [example(encoder, key, f"a red {key} circle", size) for key, size in answers.items()]
    together = model(batch=batch_of(encoder, *examples))
    alone = sum(model(batch=batch_of(encoder, each)) for each in examples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_without_a_batch_the_forward_is_transformers_own(
    scenes_base: Path, batch: CaptionBatch, encoder: SampleEncoder, settings: PixelSettings
) -> None:
    inputs = library_inputs(batch, encoder, settings)
    with torch.no_grad():
        ours = load_model(scenes_base, CONFIG).eval()(**inputs).logits
        library = Qwen2VLForConditionalGeneration.from_pretrained(scenes_base, dtype=torch.float32)
        theirs = library.eval()(**inputs).logits
    assert torch.equal(ours, theirs)


def test_batch_without_a_target_gives_zero_gradients_to_every_adapter_tensor(
    model: Any, encoder: SampleEncoder
) -> None:
    empty = batch_of(encoder, encoder.dummy, encoder.dummy)
    assert empty.target_tokens == 0
    loss = model(batch=empty)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_dummies_and_padding_do_not_change_the_loss(model: Any, encoder: SampleEncoder) -> None:
    short = example(encoder, "short", "a red circle", (56, 56))
    alone = model(batch=batch_of(encoder, short))
    unlearned = example(encoder, "long", "a red circle " * 20, (56, 112))
    unlearned.chat.labels[:] = IGNORE
    padded = model(batch=batch_of(encoder, encoder.dummy, short, unlearned))
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_logits_are_computed_at_targets_alone(model: Any, batch: CaptionBatch) -> None:
    seen = []
    handle = model.get_base_model().lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape))
    )
    model(batch=batch)
    handle.remove()
    assert seen == [(batch.target_tokens, 96)]


# --- the vision tower ---


@pytest.mark.parametrize("hooked", [False, True])
def test_frozen_tower_is_run_without_a_graph(model: Any, batch: CaptionBatch, hooked: bool) -> None:
    if hooked:  # what libraries do for gradient checkpointing: it marks the tower's patch embedding too
        model.enable_input_require_grads()
    seen = []
    tower = model.get_base_model().model.visual
    handle = tower.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (inputs[0].requires_grad, output.pooler_output.requires_grad)
        )
    )
    model(batch=batch).backward()
    handle.remove()
    assert seen == [(False, False)]
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("part", "trained"), [("vision", ("blocks.", "patch_embed.")), ("merger", ("merger.",))]
)
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "no lora"])
def test_tower_part_that_trains_gets_gradients(
    scenes_base: Path,
    settings: PixelSettings,
    batch: CaptionBatch,
    part: Any,
    trained: tuple[str, ...],
    lora: LoraConfig | None,
) -> None:
    config = CONFIG.model_copy(update={"train": (part,)})
    model = loss_model(scenes_base, lora, config, pixel_settings=settings)
    base = model.get_base_model() if lora else model
    assert base.vision_features(batch).requires_grad
    found = gradients(model, model(batch=batch))
    tower = {name: value for name, value in found.items() if ".visual." in name}
    assert tower and all(name.split(".visual.")[1].startswith(trained) for name in tower)
    assert all(value.abs().max() > 0 for name, value in tower.items() if "qkv.bias" not in name)
    assert len(found) - len(tower) == (28 if lora else 0)


def test_language_and_tied_head_train_fully(
    scenes_base: Path, settings: PixelSettings, batch: CaptionBatch
) -> None:
    config = CONFIG.model_copy(update={"train": ("language",)})
    model = loss_model(scenes_base, None, config, pixel_settings=settings)
    found = gradients(model, model(batch=batch))
    assert "model.language_model.embed_tokens.weight" in found
    assert not any(".visual." in name for name in found)
    assert all(value.abs().max() > 0 for name, value in found.items() if "k_proj.bias" not in name)


# --- the adapter ---


def test_adapter_lies_on_the_language_model_alone(model: Any) -> None:
    trained = trainable_parameters(model)
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven projections
    assert all(".language_model.layers." in name and ".lora_" in name for name in trained)
    assert model.peft_config["default"].r == 4 and model.peft_config["default"].lora_alpha == 8


def test_adapter_alone_starts_as_the_base(
    scenes_base: Path, settings: PixelSettings, batch: CaptionBatch
) -> None:
    base = load_model(scenes_base, CONFIG)
    base.pixel_settings = settings
    before = base(batch=batch)
    after = make_trainable(base, LORA, CONFIG)(batch=batch)
    assert torch.equal(before, after)


@pytest.mark.parametrize("target", ["q_prj", "proj_q", "language_model", "layers"])
def test_lora_target_that_matches_nothing_is_refused_in_one_line(scenes_base: Path, target: str) -> None:
    lora = LoraConfig(target_modules=("q_proj", target))
    with pytest.raises(
        UserError, match=f"^lora.target_modules: '{target}' matches no linear layer .*q_proj.*$"
    ):
        make_trainable(load_model(scenes_base, CONFIG), lora, CONFIG)


def test_head_of_a_tied_base_cannot_train_alone(scenes_base: Path) -> None:
    config = CONFIG.model_copy(update={"train": ("head",)})
    with pytest.raises(UserError, match=r"^model\.train names `head`, but this base ties lm_head"):
        make_trainable(load_model(scenes_base, CONFIG), LORA, config)


# --- activation checkpointing ---


@pytest.mark.parametrize(("every", "recomputed"), [(0, 0), (2, 1), (1, 2)], ids=["none", "every_2", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_recomputes_layers_and_changes_no_value(
    scenes_base: Path,
    settings: PixelSettings,
    batch: CaptionBatch,
    every: int,
    recomputed: int,
    dropout: float,
) -> None:
    def run(every: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        lora = LORA.model_copy(update={"dropout": dropout})
        model = loss_model(scenes_base, lora, pixel_settings=settings)
        base = model.get_base_model()
        set_activation_checkpointing(base, every)
        calls = []
        for layer in base.model.language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(3)
        loss = model(batch=batch)
        found = gradients(model, loss)
        return loss.detach(), found, len(calls) - 2

    plain_loss, plain, _ = run(0)
    loss, found, extra = run(every)
    assert extra == recomputed
    assert torch.equal(loss, plain_loss)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-6, atol=1e-7, msg=name)


# --- loading ---


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def copy(scenes_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(scenes_base, tmp_path / "base")


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder, CONFIG)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"model.base = {folder}: ")
    return message


def split_in_two(folder: Path) -> None:
    """Turn the single file of weights into two with an index."""
    tensors = weights(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_hub_names_and_newer_names_load_the_same_weights(scenes_base: Path, copy: Path) -> None:
    tensors = weights(scenes_base)
    assert "visual.patch_embed.proj.weight" in tensors and "model.layers.0.mlp.up_proj.weight" in tensors
    newer = {runtime_name(name): tensor for name, tensor in tensors.items()}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in newer
    rewrite(copy, newer)
    hub_model, newer_model = (
        load_model(scenes_base, CONFIG).state_dict(),
        load_model(copy, CONFIG).state_dict(),
    )
    assert hub_model.keys() == newer_model.keys()
    for name, tensor in hub_model.items():
        assert torch.equal(tensor, newer_model[name]), name
        stored = "model.language_model.embed_tokens.weight" if name == "lm_head.weight" else name
        assert torch.equal(tensor, newer[stored].float()), name


def test_split_weights_load_like_one_file(scenes_base: Path, copy: Path) -> None:
    split_in_two(copy)
    whole, split = load_model(scenes_base, CONFIG).state_dict(), load_model(copy, CONFIG).state_dict()
    assert all(torch.equal(tensor, split[name]) for name, tensor in whole.items())


def test_missing_tensor_is_named_in_one_line(copy: Path) -> None:
    tensors = weights(copy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(copy, tensors)
    message = error_of(copy)
    assert "1 missing keys in its weights, first model.language_model.layers.1.mlp.up_proj.weight" in message


def test_superfluous_tensor_is_named_in_one_line(copy: Path) -> None:
    rewrite(copy, {**weights(copy), "model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert "1 unexpected keys in its weights, first model.language_model.layers.2" in error_of(copy)


def test_tensor_of_another_shape_is_named_in_one_line(copy: Path) -> None:
    rewrite(copy, {**weights(copy), "model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert "model.language_model.layers.1.mlp.up_proj.weight" in error_of(copy)


def test_missing_shard_is_one_line(copy: Path) -> None:
    split_in_two(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in error_of(copy)


@pytest.mark.parametrize("left", [0, 4, 1000, -10])
def test_cut_off_weights_are_one_line(copy: Path, left: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    error_of(copy)


def test_folder_without_weights_is_one_line(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    error_of(copy)


def test_damaged_config_is_one_line(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    error_of(copy)


def test_loss_model_renames_like_the_library_model() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kinds = (Qwen2VLForCaptionLoss, Qwen2VLForConditionalGeneration)
    ours, theirs = (get_checkpoint_conversion_mapping(kind.__name__) for kind in kinds)
    assert ours and [str(one) for one in ours] == [str(one) for one in theirs or []]
