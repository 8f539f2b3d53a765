import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from qwenvl_dist.synthetic.base import SHAPES, base_config, write_scene_tokenizer
from qwenvl_dist.synthetic.scenes import MIXED_STYLES, draw_scene, scene

DEMO_BASE = Path(__file__).parents[2] / "launch" / "demo_base"


def test_shipped_base_is_small_and_its_tokenizer_is_what_the_code_builds(tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in DEMO_BASE.iterdir()) < 1_100_000
    write_scene_tokenizer(tmp_path)
    shipped, built = (AutoTokenizer.from_pretrained(folder) for folder in (DEMO_BASE, tmp_path))
    assert shipped.get_vocab() == built.get_vocab()
    text = "above: a red circle. below: a blue square.<|im_end|>"
    assert shipped(text)["input_ids"] == built(text)["input_ids"]


def test_shipped_base_captions_unseen_pairs_in_its_own_style() -> None:
    processor = AutoProcessor.from_pretrained(DEMO_BASE)
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(DEMO_BASE, dtype=torch.float32).eval()
    drawn = [scene(number, seed=123, split="validation") for number in range(40)]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    batch = processor(
        text=[prompt] * len(drawn), images=[draw_scene(one) for one in drawn], return_tensors="pt"
    )
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=20, do_sample=False)
    said = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(
        text.strip()
        in {wording.format(a=one.upper.name, b=one.lower.name) for wording in MIXED_STYLES["inventory"]}
        for text, one in zip(said, drawn, strict=True)
    )
    assert right >= 38


@pytest.mark.parametrize(
    "key", ["hidden_size", "vocab_size", "image_token_id", "eos_token_id", "vision_config"]
)
def test_shipped_config_is_the_scenes_shape(key: str) -> None:
    config = json.loads((DEMO_BASE / "config.json").read_text())
    first = config["bos_token_id"]
    assert config[key] == base_config(SHAPES["scenes"], first_special_id=first)[key]
