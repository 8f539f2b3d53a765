import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from qwenvl_dist.commands import synthetic as command
from qwenvl_dist.errors import UserError
from qwenvl_dist.synthetic import base as base_module
from qwenvl_dist.synthetic.base import (
    SHAPES,
    TEXT_FILES,
    BaseShape,
    _bfloat16,
    base_bytes,
    base_config,
    base_tensors,
    write_random_base,
)
from qwenvl_dist.synthetic.scenes import captions, draw_scene, scene


def messages(caption: str | None = None) -> list[dict]:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": caption}]}
    return [user] if caption is None else [user, assistant]


def test_7b_has_the_published_number_of_names_and_bytes() -> None:
    names = [name for name, _ in base_tensors(SHAPES["7b"])]
    assert len(names) == len(set(names)) == 730
    assert base_bytes(SHAPES["7b"]) == 16_582_751_232


def test_2b_ties_its_head_and_7b_does_not() -> None:
    assert "lm_head.weight" not in dict(base_tensors(SHAPES["2b"]))
    assert dict(base_tensors(SHAPES["7b"]))["lm_head.weight"] == (152064, 3584)
    assert base_bytes(SHAPES["2b"]) == 4_417_971_200


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_are_those_of_the_library_model(name: str) -> None:
    from transformers import Qwen2VLConfig

    shape = SHAPES[name]
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**base_config(shape)))
    runtime = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if shape.tied:
        del runtime["lm_head.weight"]
    renamed = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): dims
        for key, dims in runtime.items()
    }
    assert dict(base_tensors(shape)) == renamed


@pytest.mark.parametrize("name", SHAPES)
def test_rotary_sections_fill_half_a_head(name: str) -> None:
    shape = SHAPES[name]
    assert sum(shape.mrope_section) == shape.hidden // shape.heads // 2
    if shape.hidden // shape.heads == 128:
        assert shape.mrope_section == (16, 24, 24)


def test_random_base_loads_and_gives_finite_logits(scenes_base: Path) -> None:
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(
        scenes_base, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(scenes_base)
    assert model.config.image_token_id == processor.image_token_id
    text = processor.apply_chat_template(messages("a red circle above a blue square"), tokenize=False)
    pictures = [draw_scene(scene(number, 0)) for number in range(2)]
    batch = processor(text=[text, text], images=pictures, return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4]]
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 2 * 4
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[-1] == SHAPES["scenes"].vocab
    assert torch.isfinite(logits).all()
    assert (logits[0, -1] != logits[1, -1]).any()  # the pictures reach the last token


def test_same_seed_gives_the_same_bytes_and_another_seed_others(scenes_base: Path, tmp_path: Path) -> None:
    again = write_random_base(tmp_path / "again", "scenes")
    other = write_random_base(tmp_path / "other", "scenes", seed=1)
    for path in scenes_base.iterdir():
        same = (again / path.name).read_bytes() == path.read_bytes()
        assert same, path.name
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_several_files_hold_the_same_tensors_as_one(
    scenes_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "MAX_FILE_BYTES", 200_000)
    monkeypatch.setattr(base_module, "_BLOCK_ELEMENTS", 1000)
    split = write_random_base(tmp_path / "split", "scenes")
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == base_bytes(SHAPES["scenes"])
    whole = load_file(scenes_base / "model.safetensors")
    joined = {name: tensor for file in files for name, tensor in load_file(split / file).items()}
    assert joined.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # signed zeros and two ties
    ours = torch.frombuffer(bytearray(_bfloat16(values)), dtype=torch.bfloat16)
    assert torch.equal(ours, torch.from_numpy(values).to(torch.bfloat16))


def test_tokenizer_round_trip_offsets_and_whole_words(scenes_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scenes_base)
    assert tokenizer.is_fast and len(tokenizer) <= SHAPES["scenes"].vocab
    for text in ("a red circle above a blue square", "Ünïcode, 日本 & 42 cats\n\n  twice"):
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.decode(encoded["input_ids"]) == text
    caption = captions(scene(0, 0), "plain")[0]
    encoded = tokenizer(caption, return_offsets_mapping=True)
    assert len(encoded["input_ids"]) == len(caption.split())
    assert [caption[begin:end].strip() for begin, end in encoded["offset_mapping"]] == caption.split()
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"


def test_chat_text_has_the_family_form(scenes_base: Path) -> None:
    processor = AutoProcessor.from_pretrained(scenes_base)
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>COCO Yes:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(messages(), tokenize=False, add_generation_prompt=True) == prompt
    whole = processor.apply_chat_template(messages("a red circle"), tokenize=False)
    assert whole == prompt + "a red circle<|im_end|>\n"


def test_published_vocabulary_needs_a_folder_with_all_text_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--text-files"):
        write_random_base(tmp_path / "out", "tiny")
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match=r"lacks generation_config\.json"):
        write_random_base(tmp_path / "out", "tiny", tmp_path / "text")
    with pytest.raises(UserError, match="shape is 'huge'"):
        write_random_base(tmp_path / "out", "huge")
    assert not (tmp_path / "out").exists()


def test_text_files_are_copied_beside_the_published_token_ids(
    scenes_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base_module.SHAPES, "tiny", BaseShape(32, 64, 1, 2, 1, 1, 32, 2, True, 151936))
    text = tmp_path / "text"
    text.mkdir()
    for name in TEXT_FILES:
        shutil.copyfile(scenes_base / name, text / name)
    out = write_random_base(tmp_path / "out", "tiny", text)
    assert all((out / name).read_bytes() == (text / name).read_bytes() for name in TEXT_FILES)
    assert json.loads((out / "config.json").read_text())["image_token_id"] == 151655


def test_commands_write_what_the_functions_write(
    scenes_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["synthetic", "base", "--out", str(tmp_path / "base"), "--shape", "scenes"])
    assert arguments.run(arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["bytes"] == base_bytes(SHAPES["scenes"])
    assert (tmp_path / "base" / "vocab.json").read_bytes() == (scenes_base / "vocab.json").read_bytes()
    out = tmp_path / "scenes"
    arguments = parser.parse_args(
        ["synthetic", "scenes", "--out", str(out), "--count", "2", "--style", "inventory"]
    )
    assert arguments.run(arguments) == 0
    assert capsys.readouterr().out.split() == [
        str(out / split / "captions.json") for split in ("train", "validation")
    ]
