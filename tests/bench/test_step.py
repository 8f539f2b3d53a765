"""The step's arithmetic as counted beside the operations that run, and the whole measurement on a tiny base."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenvl_dist.__main__ import main
from qwenvl_dist.bench import step
from qwenvl_dist.config import PROJECTIONS, LoraConfig, ModelConfig
from qwenvl_dist.data.batch import CaptionBatch, Example, collate
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model import flops
from qwenvl_dist.model.fast_path import install
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.lora import make_trainable
from qwenvl_dist.model.pixels import PixelSettings
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def encoder(scenes_processor: Any) -> SampleEncoder:
    return SampleEncoder(scenes_processor, ImageSizeRule(side=56), 256, caption_mark="&&")


def batch_of(encoder: SampleEncoder, *answers: str) -> CaptionBatch:
    grids = ((1, 4, 4),)
    rows = []
    for number, answer in enumerate(answers):
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        pixels = np.full(3 * 56 * 56, number, np.uint8)
        rows.append(Example(str(number), encoder.chat.encode_each(messages, grids, "&&"), grids, pixels))
    return collate(rows, encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token)


class Products(TorchDispatchMode):
    """Counts the arithmetic of matrix products, those with an adapter's tensors (of rank 3) aside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[0:2] if func.overloadpacket is torch.ops.aten.mm else args[1:3]
            if 3 not in (*left.shape, *right.shape):
                self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def test_counted_products_are_those_that_run(
    scenes_base: Path, scenes_processor: Any, encoder: SampleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, config = LoraConfig(rank=3), ModelConfig(dtype="float32", attention="sdpa")
    batch = batch_of(encoder, "a red circle above a blue square", "a red circle above a blue square")
    # The fused layers also run over the line break that ends each row.
    monkeypatch.setattr(flops, "_lengths", lambda batch: [batch.input_ids.shape[1]] * 2)
    base = load_model(scenes_base, config)
    base.pixel_settings = PixelSettings.of(scenes_processor)
    model = make_trainable(base, lora, config)
    install(base, False)
    with Products() as counted:
        model(batch=batch).backward()
    work = flops.step_work(base.config, batch, lora.rank, lora.target_modules)
    # The last layer's queries are made for all tokens, forward and backward, though only targets need them.
    superfluous = batch.input_ids.numel() - batch.target_tokens
    hidden = base.config.text_config.hidden_size
    assert counted.flops == work.product_flops + 2 * 2 * superfluous * hidden * hidden


def test_what_is_spared_is_not_counted(scenes_base: Path, encoder: SampleEncoder) -> None:
    config = load_model(scenes_base, ModelConfig(dtype="float32")).config
    batch = batch_of(encoder, "a red circle", "a red circle")
    once, twice = (
        flops.step_work(config, one, 4, PROJECTIONS)
        for one in (batch, batch_of(encoder, *["a red circle"] * 4))
    )
    assert twice.flops == 2 * once.flops
    hidden, vocabulary = config.text_config.hidden_size, config.text_config.vocab_size
    assert once.products[flops.Product(batch.target_tokens, hidden, vocabulary)] == 1
    assert once.seconds_of_products(torch.float32, torch.device("cpu")) > 0


def test_captions_are_parted_into_the_samples_they_would_be(encoder: SampleEncoder) -> None:
    captions = ("a red circle", "a blue square above a circle", "a triangle")
    shared = batch_of(encoder, "&&".join(captions), "a circle&&a square")
    alone = batch_of(encoder, *captions, "a circle", "a square")
    parted = step.separate_captions(shared, encoder.chat.pad_token, encoder.chat.image_token)
    length = parted.input_ids.shape[1]  # without the line break at the end
    assert torch.equal(parted.labels, alone.labels[:, :length])
    assert torch.equal(parted.target_ids, alone.target_ids) and parted.target_tokens == shared.target_tokens
    for mine, theirs, labels in zip(parted.input_ids, alone.input_ids, parted.labels, strict=True):
        used = int((labels != -100).nonzero()[-1]) + 1
        assert torch.equal(mine[:used], theirs[:used])
    assert len(parted.grids) == 5 and parted.pixels.view(5, -1)[:, 0].tolist() == [0, 0, 0, 1, 1]


def run_bench(base: str, out: str, arguments: list[str]) -> None:
    """One rank: the command, its report into a file."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sizes = ["--photos", "4", "--batch-size", "2", "--steps", "2", "--image-size", "56"]
        code = main(["bench", "step", "--base", base, *sizes, "--json", *arguments, "model.dtype=float32"])
    Path(out).write_text(printed.getvalue().splitlines()[-1])
    raise SystemExit(code)


@pytest.mark.slow
@pytest.mark.dist
def test_a_trainer_takes_turns_on_the_same_samples(scenes_base: Path, tmp_path: Path) -> None:
    arguments = ["--compare", "trainer", "lora.dropout=0.0"]
    options = {"base": str(scenes_base), "out": str(tmp_path / "out"), "arguments": arguments}
    run_ranks("tests.bench.test_step:run_bench", 1, timeout=240, **options)
    report = json.loads((tmp_path / "out").read_text())
    for key in (
        "samples_per_second",
        "step_seconds",
        "matrix_rate_share",
        "trainer_samples_per_second",
        "ratio",
    ):
        assert report[key] > 0, key
    assert 0 <= report["data_wait_fraction"] < 1
    assert report["memory_gib_by_checkpointing"]["none"] == report["peak_memory_gib"] > 0
    kept = report["kept_gib_by_checkpointing"]
    assert 0 < kept["all"] < kept["every_2"] < kept["none"]
    parts = ["imports", "join", "data", "model", "zero", "first_batch", "first_step"]
    assert sorted(report["startup_seconds"]) == sorted(parts)
    # The adapters start from other random numbers, but as zero: the losses part slowly.
    assert report["losses"] == pytest.approx(report["trainer_losses"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.dist
def test_shared_prefixes_are_measured_beside_separate_samples(scenes_base: Path, tmp_path: Path) -> None:
    options = {"base": str(scenes_base), "out": str(tmp_path / "out"), "arguments": ["--captions", "each"]}
    run_ranks("tests.bench.test_step:run_bench", 1, timeout=240, **options)
    report = json.loads((tmp_path / "out").read_text())
    assert report["captions_per_second"] == pytest.approx(5 * report["samples_per_second"])
    assert report["ratio_to_separate"] > 0 and report["ratio"] is None


@pytest.mark.slow
@pytest.mark.dist
def test_features_are_measured_beside_a_trainer_on_their_pictures(
    scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    base, features = str(scenes_base), str(tmp_path / "features")
    encode = [
        str(scene_shards),
        "--base",
        base,
        "--out",
        features,
        "--image-size",
        "56",
        "--dtype",
        "float32",
    ]
    run_ranks("tests.training.test_encode:run_encode", 1, timeout=240, arguments=encode)
    arguments = [
        "--features",
        features,
        "--shards",
        str(scene_shards),
        "--compare",
        "trainer",
        "lora.dropout=0.0",
    ]
    options = {"base": base, "out": str(tmp_path / "out"), "arguments": arguments}
    run_ranks("tests.bench.test_step:run_bench", 1, timeout=240, **options)
    report = json.loads((tmp_path / "out").read_text())
    assert report["ratio"] > 0
    assert report["losses"] == pytest.approx(report["trainer_losses"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--checkpointing", "some"], "--checkpointing: model.checkpointing"),
        (["--captions", "each", "--compare", "trainer"], "--compare trainer takes joined captions"),
        (["--features", "here", "--compare", "trainer"], "--features takes joined captions"),
        (["model.fast_pth=false"], "did you mean 'fast_path'?"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "step", "--base", "somewhere", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
