"""Captions behind one prefix against the same captions as samples of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenvl_dist.data.batch import Example, collate
from qwenvl_dist.data.chat import IGNORE, TooLong
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.errors import UserError
from qwenvl_dist.model import fast_path
from qwenvl_dist.model.forward import segment_blocks, segment_mask
from qwenvl_dist.model.load import choose_attention, use_flex_attention
from qwenvl_dist.model.lora import set_activation_checkpointing
from qwenvl_dist.model.pixels import PixelSettings
from tests.model.made_batches import CONFIG, LORA, batch_of, gradients, loss_model

CAPTIONS = (
    "a red circle above a blue square",
    "a blue square",
    "a circle",
    "a red circle",
    "below: a blue square.",
)
OTHERS = ("a green triangle above a black circle", "a triangle")


def messages(text: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]


def photo(encoder: SampleEncoder, seed: int, captions: tuple[str, ...]) -> tuple[Example, list[Example]]:
    """The captions of a random picture behind one prefix, and each as its own sample."""
    grids = ((1, 4, 6),)
    pixels = np.random.default_rng(seed).integers(0, 256, 3 * 56 * 84, dtype=np.uint8)
    each = encoder.chat.encode_each(messages("&&".join(captions)), grids, "&&")
    alone = [encoder.chat.encode(messages(caption), grids) for caption in captions]
    return Example("each", each, grids, pixels), [Example("alone", chat, grids, pixels) for chat in alone]


def run(
    model: Any, *examples: Example, encoder: SampleEncoder
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    batch = batch_of(encoder, *examples)
    loss = model(batch=batch)
    return loss.detach(), gradients(model, loss), batch.target_tokens


@pytest.mark.parametrize("mode", ["plain", "fused", "partitioned"])
@pytest.mark.parametrize("every", [0, 1])
def test_captions_behind_one_prefix_learn_what_separate_samples_do(
    scenes_base: Path, settings: PixelSettings, encoder: SampleEncoder, mode: str, every: int
) -> None:
    model = loss_model(scenes_base, LORA, CONFIG, pixel_settings=settings)
    if mode != "plain":
        fast_path.install(model.get_base_model(), mode == "partitioned")
    set_activation_checkpointing(model.get_base_model(), every)
    one, ones = photo(encoder, 1, CAPTIONS)
    two, twos = photo(encoder, 2, OTHERS)
    single, singles = photo(encoder, 3, CAPTIONS[:1])
    shared, found, tokens = run(model, one, encoder.dummy, two, single, encoder=encoder)
    separate, expected, same_tokens = run(model, *ones, *twos, *singles, encoder=encoder)
    assert tokens == same_tokens
    torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["plain", "fused", "partitioned"])
@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:1]])
def test_flex_attention_gives_the_loss_of_sdpa(
    scenes_base: Path,
    settings: PixelSettings,
    encoder: SampleEncoder,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    captions: tuple[str, ...],
) -> None:
    """Forward alone, and not compiled: FlexAttention has no backward pass on CPUs."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    calls = []

    def eager(*arguments: Any, training: bool, **options: Any) -> torch.Tensor:
        calls.append(options["block_mask"])
        return flex.flex_attention(*arguments, **options)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", eager)
    one, two = photo(encoder, 1, captions)[0], photo(encoder, 2, captions)[0]
    batch = batch_of(encoder, one, encoder.dummy, two)
    assert (batch.segments is None) == (len(captions) == 1)
    model = loss_model(scenes_base, LORA, CONFIG, pixel_settings=settings)
    base = model.get_base_model()
    if mode != "plain":
        fast_path.install(base, mode == "partitioned")
    with torch.no_grad():
        expected = model(batch=batch)
        assert not calls
        use_flex_attention(base)
        found = model(batch=batch)
    assert len(calls) == len(base.model.language_model.layers) and all(mask is not None for mask in calls)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_block_mask_shows_what_the_dense_one_does() -> None:
    pytest.importorskip("torch.nn.attention.flex_attention")
    lengths = torch.tensor([[120, 150, 30], [300, 0, 0]])  # prefix, first answer, second answer
    segments = torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths])
    blocks, dense = segment_blocks(segments), segment_mask(segments, torch.float32)
    at = torch.arange(300)
    for row in range(2):
        shown = blocks.mask_mod(torch.tensor(row), torch.tensor(0), at[:, None], at[None, :])
        assert torch.equal(shown, dense[row, 0] == 0)
    assert blocks.to_dense()[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_caption_has_the_tokens_and_positions_it_has_alone(encoder: SampleEncoder) -> None:
    shared, alone = photo(encoder, 0, CAPTIONS)
    chat = shared.chat
    assert chat.segments is not None and chat.segments.tolist() == sorted(chat.segments.tolist())
    for number, each in enumerate(alone, start=1):
        mine = np.isin(chat.segments, (0, number))
        length = int(mine.sum())
        assert (chat.input_ids[mine] == each.chat.input_ids[:length]).all()
        assert (chat.position_ids[:, mine] == each.chat.position_ids[:, :length]).all()
        assert (chat.labels[mine] == each.chat.labels[:length]).all()
        assert (each.chat.labels[length:] == IGNORE).all()


def test_the_prefix_stands_once(encoder: SampleEncoder) -> None:
    shared, alone = photo(encoder, 0, CAPTIONS)
    assert (shared.chat.input_ids == encoder.chat.image_token).sum() == 6
    assert len(shared.chat.input_ids) < sum(len(each.chat.input_ids) for each in alone) / 2


def test_a_caption_sees_the_prefix_and_itself() -> None:
    mask = segment_mask(torch.tensor([[0, 0, 1, 1, 2, 0]]), torch.float32)[0, 0]
    seen = [[column for column in range(6) if mask[row, column] == 0] for row in range(6)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 5]]
    assert mask.unique().tolist() == [-torch.inf, 0]


def test_a_single_caption_and_a_conversation_are_encoded_plainly(encoder: SampleEncoder) -> None:
    grids = ((1, 4, 6),)
    assert encoder.chat.encode_each(messages("a circle"), grids, "&&").segments is None
    turns = [*messages("a circle"), {"role": "user", "content": "And?"}, messages("a square&&a triangle")[1]]
    assert encoder.chat.encode_each(turns, grids, "&&").segments is None


def test_captions_that_do_not_fit_together_are_too_long(encoder: SampleEncoder) -> None:
    with pytest.raises(TooLong, match=r"^\d+ tokens in 150 answers exceed max_length 256$"):
        encoder.chat.encode_each(messages("&&".join(CAPTIONS * 30)), ((1, 4, 6),), "&&")


def test_a_batch_without_shared_prefixes_has_no_mask(encoder: SampleEncoder) -> None:
    _, alone = photo(encoder, 0, CAPTIONS)
    assert collate(alone, encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token).segments is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run it")
def test_flex_attention_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model\.attention = flex_attention: needs a GPU"):
        choose_attention("flex_attention")
