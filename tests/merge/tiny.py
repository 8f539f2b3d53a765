"""A Qwen2-VL of 0.1 M parameters, and what ranks do with it."""

from pathlib import Path
from typing import Any

import torch

from qwenvl_dist.checkpoints import manifest as manifests

IMAGE_TOKEN, VISION_START, VISION_END = 297, 298, 299
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(folder: Path, *, tied: bool, dtype: str = "float32", max_shard_size: str = "5GB") -> Path:
    """Write a base of random weights, without tokenizer."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 152,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=IMAGE_TOKEN,
        video_token_id=296,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "vocab.json").write_text("{}")
    (folder / "chat_template.json").write_text('{"chat_template": "base"}')
    (folder / "preprocessor_config.json").write_text('{"min_pixels": 3136}')
    return folder


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return two prompts with an image of 2 x 2 visual tokens each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 290, (2, 14), generator=generator)
    ids[:, 2] = VISION_START
    ids[:, 3:7] = IMAGE_TOKEN
    ids[:, 7] = VISION_END
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return the logits of `inputs()` in eval mode."""
    with torch.no_grad():
        return model.eval()(**inputs()).logits


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a folder and insist that every weight was found."""
    from transformers import Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def run_train(base: str, out: str, cases: dict[str, dict[str, Any]]) -> None:
    """Train the base a little under each case; save as the training loop does. Collective."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    for name, case in cases.items():
        _train(base, Path(out, name), **case)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train(
    base: str, out: Path, stage: int, lora: dict[str, Any] | None, parts: list[str], dtype: str
) -> None:
    import deepspeed
    import peft

    from tests.checkpoints.zero_runs import ds_config, save

    torch.manual_seed(2)
    model = load(Path(base), torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.requires_grad_(False)
    if lora is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(**lora), autocast_adapter_dtype=False)
    for parameter_name, parameter in model.named_parameters():
        if any(part in parameter_name for part in parts) and "lora_" not in parameter_name:
            parameter.requires_grad_(True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trainable, lr=0.02), config=ds_config(stage, dtype)
    )
    for step in range(3):
        batch = inputs(10 * step + torch.distributed.get_rank())
        engine.backward(engine(**batch, labels=batch["input_ids"]).loss)
        engine.step()
    save(engine, model, str(out))
    if lora is not None and torch.distributed.get_rank() == 0:
        model.peft_config["default"].save_pretrained(out)


def write_manifest(step: Path, fingerprint: str, lora: dict[str, Any] | None) -> None:
    """Put a whole manifest into a step folder: every file as it is, and the base it was trained on."""
    files = {str(p.relative_to(step)): manifests.describe_file(p) for p in manifests.files_below(step)}
    content = {"base": {"path": "base", "fingerprint": fingerprint}, "lora": lora, "files": files}
    manifests.write_manifest(step, content)
