"""Conversations with no picture, one and several in one run: every rank calls the vision tower, all learn the same."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from qwenvl_dist.config import ModelConfig
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.pixels import PixelSettings
from qwenvl_dist.synthetic.scenes import captions, scene
from tests.made_shards import Members, jpeg, key_of, record, stream, write_shards
from tests.ranks import run_ranks
from tests.training.runs import (
    TIMEOUT,
    adapter,
    assert_same_adapter,
    ledger,
    losses,
    run_train,
    write_recipe,
)

SIZES = (20, 1, 27)
STEPS, MICRO, ACCUMULATION = 6, 2, 2  # of two ranks
BUDGET = 32  # visual tokens of a micro-batch: the largest sample has 20
TOLERANCE = 2e-5  # float32 sums in another order


def members_of(number: int, num_images: int, sides: tuple[int, ...] = (56, 90, 40)) -> Members:
    names = ["jpg"] if num_images == 1 else [f"{image}.jpg" for image in range(num_images)]
    pictures = {name: jpeg(number + image, sides[image]) for image, name in enumerate(names)}
    return {**pictures, "json": record("COCO Yes:", captions(scene(number, 0))[0], images=num_images)}


def of_rank(position: int) -> int:
    """Which of two ranks takes this position when samples are not dealt by length."""
    return position // MICRO % 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose plan gives rank 1 of 2 nothing but text, and rank 0 one, two or three pictures a sample."""
    samples: list[list[Any]] = [[None] * size for size in SIZES]
    for position, place in enumerate(RunPlan(SIZES, seed=0, window=64).locate(0, sum(SIZES))):
        assert place is not None
        samples[place.shard][place.sample] = members_of(
            position, 0 if of_rank(position) else 1 + position % 3
        )
    return write_shards(tmp_path_factory.mktemp("mixed") / "shards", samples)


def run_watched(recipe: str, out: str) -> None:
    """One rank: train, and note for each call of the vision tower how many pictures it got, and of which keys."""
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

    calls: list[Any] = []
    vision_features = Qwen2VLForCaptionLoss.vision_features

    def watched(model: Any, batch: Any) -> torch.Tensor:
        handle = model.model.visual.register_forward_hook(
            lambda _module, _args, kwargs, _out: calls.append([list(batch.keys), len(kwargs["grid_thw"])]),
            with_kwargs=True,
        )
        try:
            return vision_features(model, batch)
        finally:
            handle.remove()

    Qwen2VLForCaptionLoss.vision_features = watched  # type: ignore[method-assign]
    try:
        run_train(recipe)
    finally:
        Path(out, f"calls-{os.environ['RANK']}.json").write_text(json.dumps(calls))


IN_ORDER = {"length_grouping": False}
RUNS: dict[
    str, tuple[int, int, int, dict[str, Any]]
] = {  # ranks, accumulation, ZeRO stage, how slots are dealt
    "one-rank-zero2": (1, 2 * ACCUMULATION, 2, IN_ORDER),
    "two-ranks-zero2": (2, ACCUMULATION, 2, IN_ORDER),
    "two-ranks-zero3": (2, ACCUMULATION, 3, IN_ORDER),
    "two-ranks-zero3-by-length": (2, ACCUMULATION, 3, {}),
    "two-ranks-zero3-by-budget": (2, ACCUMULATION, 3, {"micro_batch_visual_tokens": BUDGET}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, scenes_base: Path, shards: Path) -> Callable[[str], Path]:
    """Start each run once, on demand, and keep its folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        out = folder / name
        if not out.exists():
            world, accumulation, stage, dealing = RUNS[name]
            pixels = {"min_pixels": 784, "max_pixels": 6272}
            recipe = write_recipe(
                folder / f"{name}.yaml", scenes_base, shards, out, stage,
                lora={"dropout": 0.0},  # its masks follow the micro-batches, which dealing by length changes
                data={"image_size": pixels, "micro_batch_size": MICRO, **dealing},
                train={"max_steps": None, "epochs": 1, "grad_accum_steps": accumulation},
            )  # fmt: skip
            run_ranks(
                "tests.training.test_mixed:run_watched",
                world,
                timeout=TIMEOUT,
                recipe=str(recipe),
                out=str(out),
            )
        return out

    return run


def calls(out: Path, rank: int) -> list[tuple[list[str], int]]:
    return [(keys, images) for keys, images in json.loads((out / f"calls-{rank}.json").read_text())]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["two-ranks-zero2", "two-ranks-zero3"])
def test_a_rank_of_all_text_calls_the_tower_as_often_as_the_other(
    runs: Callable[[str], Path], name: str
) -> None:
    out = runs(name)
    planned = RunPlan(SIZES, seed=0, window=64).locate(0, sum(SIZES))
    keys = [
        [key_of(p.shard, p.sample) for i, p in enumerate(planned) if p and of_rank(i) == r] for r in (0, 1)
    ]
    for rank in (0, 1):
        assert len(calls(out, rank)) == STEPS * ACCUMULATION
        assert [key for seen, _ in calls(out, rank) for key in seen] == keys[rank]
    assert all(images >= 2 for _, images in calls(out, 0))
    assert all(images == 1 for _, images in calls(out, 1))  # the dummy


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name in RUNS if name != "one-rank-zero2"])
def test_text_and_several_pictures_learn_the_same_in_any_split(
    runs: Callable[[str], Path], name: str
) -> None:
    straight, other = runs("one-rank-zero2"), runs(name)
    assert len(losses(straight)) == STEPS and losses(straight)[-1] < losses(straight)[0]
    assert ledger(other) == ledger(straight)
    assert losses(other) == pytest.approx(losses(straight), rel=TOLERANCE)
    assert_same_adapter(adapter(straight, STEPS), adapter(other, STEPS), 5e-5)


def hub_loss(model: Any, processor: Any, members: Members) -> torch.Tensor:
    """The summed loss as transformers and the hub's processor have it, with the answer and its end to learn."""
    messages = json.loads(members["json"])["messages"]
    pictures = [
        Image.open(io.BytesIO(data)).convert("RGB") for name, data in members.items() if name != "json"
    ]

    def encode(text: str) -> Any:
        return processor(text=[text], images=pictures or None, return_tensors="pt")

    prompt = encode(processor.apply_chat_template(messages[:-1], add_generation_prompt=True))
    inputs = encode(processor.apply_chat_template(messages).removesuffix("\n"))
    labels = inputs["input_ids"].clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    return model(**inputs, labels=labels).loss * (labels != -100).sum()


def test_several_pictures_cost_what_the_hubs_processor_and_model_say(
    tmp_path: Path, scenes_base: Path, scenes_processor: Any
) -> None:
    # Sides that neither side has to resize.
    samples = [members_of(n, images, (56, 112, 84)) for n, images in enumerate((3, 0, 2, 1))]
    encoder = SampleEncoder(scenes_processor, ImageSizeRule(None, 56 * 56, 112 * 112), 512)
    folder = write_shards(tmp_path / "shards", [samples])
    [[batch]] = stream(folder, encoder, layout=StepLayout(1, 4, 1), shuffle=False).iterate()
    assert batch.grids == ((1, 4, 4), (1, 8, 8), (1, 6, 6), (1, 4, 4), (1, 8, 8), (1, 4, 4))
    ours = load_model(scenes_base, ModelConfig(dtype="float32"))
    ours.pixel_settings = PixelSettings.of(scenes_processor)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(scenes_base, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([hub_loss(theirs, scenes_processor, members) for members in samples])
        torch.testing.assert_close(ours(batch=batch), expected.sum(), rtol=1e-5, atol=1e-4)
        for number, loss in enumerate(expected):
            alone = stream(folder, encoder, layout=StepLayout(1, 1, 1), shuffle=False)
            [batch] = next(alone.iterate(number))
            torch.testing.assert_close(ours(batch=batch), loss, rtol=1e-5, atol=1e-4)
