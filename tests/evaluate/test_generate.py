import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from qwenvl_dist.config import PixelRange
from qwenvl_dist.data.formats import caption_messages
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.prompts import Asked, split_last_answer
from qwenvl_dist.errors import UserError
from qwenvl_dist.evaluate.captioner import Captioner, load_captioner, training_image_size
from qwenvl_dist.evaluate.predict import find_pictures, predict
from qwenvl_dist.merge.merge import write_adapter as write_merged_adapter
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model.generate import greedy_tokens
from qwenvl_dist.model.load import load_processor, save_processor
from qwenvl_dist.synthetic.base import write_random_base
from tests.evaluate.conftest import edit_json, write_adapter

PROMPT = "COCO Yes:"
NEW_TOKENS = 8


def library_tokens(base: Path, picture: Path, side: int | None = None) -> list[int]:
    """Generate as the model's own card says: hub processor, process_vision_info, `generate`."""
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(base)
    part: dict[str, Any] = {"type": "image", "image": Image.open(picture)}
    if side is not None:
        part |= {"resized_height": side, "resized_width": side}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images: Any = process_vision_info(messages)[0]
    inputs = processor(text=[text], images=images, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def our_tokens(captioner: Captioner, pictures: list[Path]) -> list[list[int]]:
    encoder = captioner.prompt_encoder()
    messages = caption_messages(PROMPT, "")[:1]
    prompts = [encoder.prompt(messages, [path.read_bytes()], Asked(path.name, 0, "")) for path in pictures]
    return greedy_tokens(captioner.model, encoder.collate(prompts), NEW_TOKENS, captioner.processor.tokenizer)


def test_one_picture_gives_the_tokens_of_the_library(base: Path, pictures: list[Path]) -> None:
    captioner = load_captioner(str(base))
    for picture in pictures[:3]:
        expected = library_tokens(base, picture)
        assert our_tokens(captioner, [picture]) == [expected]
        assert len(set(expected)) > 1  # else anything would match


def test_fixed_side_gives_the_tokens_of_the_library(base: Path, pictures: list[Path]) -> None:
    captioner = load_captioner(str(base), image_size=168)
    assert our_tokens(captioner, [pictures[5]]) == [library_tokens(base, pictures[5], side=168)]


def test_published_tokenizer_and_template_give_the_tokens_of_the_library(
    hub_text_files: Path, pictures: list[Path], tmp_path: Path
) -> None:
    tiny = write_random_base(tmp_path / "tiny", "tiny", hub_text_files)
    assert our_tokens(load_captioner(str(tiny)), [pictures[1]]) == [library_tokens(tiny, pictures[1])]


def test_batch_of_different_sizes_gives_what_each_picture_gives_alone(
    base: Path, pictures: list[Path]
) -> None:
    captioner = load_captioner(str(base))
    together = our_tokens(captioner, pictures)
    assert together == [our_tokens(captioner, [picture])[0] for picture in pictures]
    assert len(set(map(tuple, together))) > 2


def test_sampling_settings_of_the_model_do_not_take_part(
    base: Path, pictures: list[Path], tmp_path: Path
) -> None:
    noisy = Path(shutil.copytree(base, tmp_path / "noisy"))
    edit_json(noisy / "generation_config.json", do_sample=True, temperature=9.0, repetition_penalty=3.0)
    captioner = load_captioner(str(noisy))
    assert our_tokens(captioner, pictures[:2]) == our_tokens(load_captioner(str(base)), pictures[:2])
    own = captioner.model.generation_config
    assert own is not None and own.repetition_penalty == 3.0  # still the model's own


def test_answer_stops_at_the_end_of_the_turn(base: Path, pictures: list[Path]) -> None:
    captioner = load_captioner(str(base))
    whole = our_tokens(captioner, [pictures[0]])[0]
    own: Any = captioner.model.generation_config
    own.eos_token_id = whole[3]
    first = whole.index(whole[3])
    assert our_tokens(captioner, [pictures[0]]) == [whole[:first]]


def test_prompts_are_padded_on_the_left_with_all_that_goes_along(base: Path, pictures: list[Path]) -> None:
    encoder = load_captioner(str(base)).prompt_encoder()
    messages = caption_messages(PROMPT, "")[:1]
    asked = Asked("key", 1, "")
    short, long = (encoder.prompt(messages, [pictures[n].read_bytes()], asked) for n in (0, 3))
    only_text = encoder.prompt([{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], [], asked)
    batch = encoder.collate([short, long, only_text, encoder.dummy])
    assert batch.asked == (asked, asked, asked)  # the dummy is left out
    for row, prompt in enumerate((short, long, only_text)):
        padding = batch.input_ids.shape[1] - len(prompt.input_ids)
        assert batch.input_ids[row, padding:].tolist() == prompt.input_ids.tolist()
        assert batch.attention_mask[row].tolist() == [0] * padding + [1] * len(prompt.input_ids)
        visual = [int(token == encoder.image_token) for token in prompt.input_ids]
        assert batch.mm_token_type_ids[row].tolist() == [0] * padding + visual
    assert batch.image_grid_thw.tolist() == [list(short.grids[0]), list(long.grids[0])]


def test_batch_without_any_picture_takes_a_dummy_for_the_vision_tower(base: Path) -> None:
    captioner = load_captioner(str(base))
    encoder = captioner.prompt_encoder()
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    batch = encoder.collate([encoder.prompt(messages, [], Asked("key", 1, ""))])
    assert batch.asked[1] is None and len(batch.grids) == 1
    assert len(captioner.answer(batch, NEW_TOKENS)) == 2


def test_question_ends_before_the_last_answer() -> None:
    messages = [
        *caption_messages("what?", "a cat"),
        *caption_messages("and now?", "a dog", num_images=0),
    ]
    prompt, reference = split_last_answer(messages)
    assert prompt == messages[:3] and reference == "a dog"
    with pytest.raises(ValueError, match="no message of the assistant"):
        split_last_answer(messages[:1])


def test_picture_size_of_training_comes_from_the_adapter_then_the_model_then_its_processor(
    base: Path, tmp_path: Path
) -> None:
    processor = load_processor(base)
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir()
    adapter.mkdir()
    bounds: Any = training_image_size([adapter, model], processor)[0]
    assert (bounds.min_pixels, bounds.max_pixels) == (56 * 56, 448 * 448)
    save_processor(processor, 140, model)
    assert training_image_size([adapter, model], processor) == (140, None)
    (adapter / "processor").mkdir()
    (adapter / "processor" / "qwenvl_dist.json").write_text('{"image_size": 84}')
    assert training_image_size([adapter, model], processor) == (84, None)
    (adapter / "qwenvl_dist.json").write_text('{"image_size": {"min_pixels": 800, "max_pixels": 9000}}')
    chosen: Any = training_image_size([adapter, model], processor)[0]
    assert (chosen.min_pixels, chosen.max_pixels) == (800, 9000)
    (adapter / "qwenvl_dist.json").write_text('{"image_size": 85}')
    with pytest.raises(UserError, match=r"qwenvl_dist\.json: damaged"):
        training_image_size([adapter, model], processor)


def test_pictures_take_the_size_they_had_in_training(
    base: Path, pictures: list[Path], tmp_path: Path
) -> None:
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    save_processor(load_processor(base), 112, tuned)
    prompt = load_captioner(str(tuned)).encoder.picture(pictures[5].read_bytes())
    assert prompt[1] == (1, 8, 8)
    assert load_captioner(str(tuned), image_size=56).encoder.picture(pictures[5].read_bytes())[1] == (1, 4, 4)


def test_several_pictures_share_the_visual_tokens_that_they_shared_in_training(
    base: Path, pictures: list[Path], tmp_path: Path
) -> None:
    def tokens(model: Path, **options: Any) -> int:
        content = [{"type": "image"}] * 3 + [{"type": "text", "text": PROMPT}]
        said = [{"role": "user", "content": content}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "x"}]}
        members = {f"{n}.jpg": picture.read_bytes() for n, picture in enumerate(pictures[:3])}
        raw = RawSample("a", {**members, "json": json.dumps({"messages": [*said, answer]}).encode()})
        encoder = load_captioner(str(model), **options).prompt_encoder()
        return sum(h * w // 4 for _, h, w in encoder.encode(raw).grids)

    bounds = PixelRange(min_pixels=56 * 56, max_pixels=112 * 112)
    bound = Path(shutil.copytree(base, tmp_path / "bound"))
    save_processor(load_processor(base), bounds, bound, max_visual_tokens=12)
    assert tokens(bound) <= 12 < tokens(bound, image_size=bounds)


def test_adapter_speaks_after_and_the_bare_base_before(
    base: Path, adapter: Path, pictures: list[Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    options: Any = {"max_new_tokens": NEW_TOKENS, "batch_size": 4}
    rows = predict(load_captioner(str(base), adapter), find_pictures(pictures), PROMPT, **options)
    bare = predict(load_captioner(str(base)), find_pictures(pictures), PROMPT, **options)
    assert [row.before for row in rows] == [row.after for row in bare]
    assert all(row.before is None for row in bare)

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(tmp_path / "merged")
    for path in base.iterdir():
        if not (tmp_path / "merged" / path.name).exists():
            shutil.copyfile(path, tmp_path / "merged" / path.name)
    merged = predict(load_captioner(str(tmp_path / "merged")), find_pictures(pictures), PROMPT, **options)
    assert [row.after for row in rows] == [row.after for row in merged]
    assert [row.after for row in rows] != [row.before for row in rows]


def test_adapter_that_merge_writes_brings_the_picture_size_of_its_training(
    base: Path, adapter: Path, pictures: list[Path], tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(adapter, tmp_path / "trained"))
    save_processor(load_processor(base), 84, trained / "processor")
    write_merged_adapter(read_trained(trained), tmp_path / "out")
    captioner = load_captioner(str(base), tmp_path / "out")
    assert captioner.encoder.picture(pictures[5].read_bytes())[1] == (1, 6, 6)


def test_adapter_that_lacks_layers_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(adapter, tmp_path / "cut"))
    tensors = load_file(cut / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name},
        cut / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"layers of this model have no tensor in it, first .*layers\.1\."):
        load_captioner(str(base), cut)


def test_adapter_with_layers_that_the_model_lacks_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    more = Path(shutil.copytree(adapter, tmp_path / "more"))
    tensors = load_file(more / "adapter_model.safetensors")
    extra = {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1." in name
    }
    save_file(tensors | extra, more / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"have no place in this model, first .*layers\.2\."):
        load_captioner(str(base), more)


def test_adapter_of_another_shape_or_target_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros(tensor.shape[0], tensor.shape[1] * 2) for name, tensor in tensors.items()},
        other / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"does not fit this model \(size mismatch") as caught:
        load_captioner(str(base), other)
    assert "\n" not in str(caught.value)
    vision = write_adapter(base, tmp_path / "vision", targets=("fc1",))
    edit_json(vision / "adapter_config.json", target_modules=["nowhere"])
    with pytest.raises(UserError, match="does not fit this model") as caught:
        load_captioner(str(base), vision)
    assert "\n" not in str(caught.value)


def test_broken_adapter_folder_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--adapter .*has no adapter_config\.json"):
        load_captioner(str(base), tmp_path)
    step = tmp_path / "step"
    step.mkdir()
    shutil.copyfile(adapter / "adapter_config.json", step / "adapter_config.json")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; .*--adapter-out"):
        load_captioner(str(base), step)
    (step / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="does not fit this model"):
        load_captioner(str(base), step)
    with pytest.raises(UserError, match="is an adapter; name its base"):
        load_captioner(str(adapter))


def test_half_precision_is_loaded_when_asked_for(base: Path, pictures: list[Path]) -> None:
    assert load_captioner(str(base)).model.dtype == torch.float32
    captioner = load_captioner(str(base), dtype="bfloat16")
    assert captioner.model.dtype == torch.bfloat16
    assert len(our_tokens(captioner, [pictures[0]])[0]) <= NEW_TOKENS
