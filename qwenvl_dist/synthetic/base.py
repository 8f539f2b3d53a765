"""Write Qwen2-VL folders with random weights: hub layout, hub tensor names, any shape of the family.

The tensor list of a shape is pure (`base_tensors`), so that names, shapes and bytes can be told without
writing. Weights go block by block straight into the safetensors files: the 7B takes 17 GB of disk but little
memory. Values depend only on (seed, tensor name), never on order or sharding.

The shapes with the published vocabulary take their tokenizer and processor files from a folder that the user
names. The micro shape `scenes` needs nothing: its tokenizer is built here, for the captions of `scenes.py`.
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_dist.errors import UserError
from qwenvl_dist.synthetic.scenes import all_words
from qwenvl_dist.synthetic.splits import whole_folder

PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE, CHANNELS = 14, 2, 2, 3
MAX_FILE_BYTES = 4_000_000_000
_BLOCK_ELEMENTS = 1 << 22
_BF16_BYTES = 2

TEXT_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)

# In the published order; their ids follow the ordinary tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_FIRST_SPECIAL_ID = 151643  # in the published vocabulary

# The family's chat format: a default system turn, one placeholder per picture, text as it stands.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if loop.first and message.role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}"
    "{{- message.content }}"
    "{%- else %}"
    "{%- for part in message.content %}"
    "{%- if part.type == 'image' %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part.type == 'video' %}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else %}"
    "{{- part.text }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


@dataclass(frozen=True)
class BaseShape:
    """The numbers that make one member of the family."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision_depth: int
    vision_width: int
    vision_heads: int
    tied: bool  # lm_head shares the input embedding
    vocab: int

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Rotary frequencies given to time, height and width; their sum is half a head."""
        half = self.hidden // self.heads // 2
        spatial = half * 3 // 8
        return half - 2 * spatial, spatial, spatial


SHAPES: dict[str, BaseShape] = {
    "scenes": BaseShape(96, 256, 2, 4, 2, 2, 64, 2, True, 448),
    "tiny": BaseShape(128, 384, 2, 4, 2, 2, 64, 2, True, 151936),
    "small": BaseShape(512, 1536, 6, 8, 2, 6, 320, 5, True, 151936),
    "trunc2b": BaseShape(1536, 8960, 4, 12, 2, 5, 1280, 16, True, 151936),
    "2b": BaseShape(1536, 8960, 28, 12, 2, 32, 1280, 16, True, 151936),
    "7b": BaseShape(3584, 18944, 28, 28, 4, 32, 1280, 16, False, 152064),
}


def shape_named(name: str) -> BaseShape:
    """Return a shape of SHAPES, or raise UserError."""
    if name not in SHAPES:
        raise UserError(f"shape is {name!r}; it must be one of {', '.join(SHAPES)}")
    return SHAPES[name]


def base_tensors(shape: BaseShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (hub name, shape) of every stored tensor, in file order. Pure: nothing is allocated."""
    width = shape.vision_width
    merged = width * MERGE_SIZE**2
    yield "visual.patch_embed.proj.weight", (width, CHANNELS, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
    for layer in range(shape.vision_depth):
        block = f"visual.blocks.{layer}"
        for norm in ("norm1", "norm2"):
            yield f"{block}.{norm}.weight", (width,)
            yield f"{block}.{norm}.bias", (width,)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{block}.mlp.fc2", width, 4 * width)
    yield "visual.merger.ln_q.weight", (width,)
    yield "visual.merger.ln_q.bias", (width,)
    yield from _linear("visual.merger.mlp.0", merged, merged)
    yield from _linear("visual.merger.mlp.2", shape.hidden, merged)

    hidden, kv_width = shape.hidden, shape.kv_heads * (shape.hidden // shape.heads)
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield from _linear(f"{block}.self_attn.q_proj", hidden, hidden)
        yield from _linear(f"{block}.self_attn.k_proj", kv_width, hidden)
        yield from _linear(f"{block}.self_attn.v_proj", kv_width, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.mlp.gate_proj.weight", (shape.intermediate, hidden)
        yield f"{block}.mlp.up_proj.weight", (shape.intermediate, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, shape.intermediate)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def base_bytes(shape: BaseShape) -> int:
    """Return the bytes of all tensors in bfloat16, without file headers."""
    return sum(_BF16_BYTES * math.prod(dims) for _, dims in base_tensors(shape))


def base_config(shape: BaseShape, first_special_id: int = _FIRST_SPECIAL_ID) -> dict[str, Any]:
    """Return `config.json` of a shape, with the keys that the hub's files have."""
    ids = {token: first_special_id + index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": shape.layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_width,
            "mlp_ratio": 4,
            "num_heads": shape.vision_heads,
            "in_chans": CHANNELS,
            "hidden_size": shape.hidden,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "spatial_patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "vocab_size": shape.vocab,
    }


def write_random_base(out: Path, shape: str, text_files: Path | None = None, seed: int = 0) -> Path:
    """Write a Qwen2-VL folder with random bfloat16 weights; it appears at once, complete, or not at all.

    Args:
        out: a folder that does not exist yet, or is empty.
        shape: a key of SHAPES. `7b` has the published 730 names and 16,582,751,232 bytes.
        text_files: folder with the tokenizer and processor files of a published Qwen2-VL (TEXT_FILES); needed
            for every shape but `scenes`, which brings its own.
        seed: of the weights; each tensor has its own stream, seeded with this and its name.
    """
    numbers = shape_named(shape)
    if shape == "scenes":
        if text_files is not None:
            raise UserError("shape `scenes` has its own tokenizer; leave --text-files out")
    elif text_files is None:
        raise UserError(
            f"shape {shape!r} needs the tokenizer files of a published Qwen2-VL; "
            "name their folder with --text-files"
        )
    else:
        missing = [name for name in TEXT_FILES if not (text_files / name).is_file()]
        if missing:
            raise UserError(f"{text_files} lacks {', '.join(missing)}; take all text files of the hub folder")
    with whole_folder(out) as folder:
        if text_files is None:
            write_scene_tokenizer(folder)
            config = base_config(numbers, first_special_id=_first_special_id(folder))
        else:
            for name in TEXT_FILES:
                shutil.copyfile(text_files / name, folder / name)
            config = base_config(numbers)
        _write_json(folder / "config.json", config)
        _write_weights(folder, numbers, seed, scaled=shape == "scenes")
    return out


def _write_weights(folder: Path, shape: BaseShape, seed: int, scaled: bool) -> None:
    """Write the safetensors files and, when there are several, their index."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    file_bytes = 0
    for name, dims in base_tensors(shape):
        size = _BF16_BYTES * math.prod(dims)
        if files[-1] and file_bytes + size > MAX_FILE_BYTES:
            files.append({})
            file_bytes = 0
        files[-1][name] = dims
        file_bytes += size

    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        single = len(files) == 1
        file_name = "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file_name))
        _write_safetensors(folder / file_name, tensors, seed, scaled)
    if len(files) > 1:
        index = {"metadata": {"total_size": base_bytes(shape)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]], seed: int, scaled: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        begin, end = end, end + _BF16_BYTES * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in tensors.items():
            for block in _random_blocks(name, dims, seed, scaled):
                file.write(_bfloat16(block))


def _random_blocks(name: str, dims: tuple[int, ...], seed: int, scaled: bool) -> Iterator[np.ndarray]:
    """Yield the values of one tensor as flat float32 blocks.

    Norm weights are 1, biases 0, matrices normal with deviation 0.02; `scaled` makes that 1 / sqrt(columns)
    (embeddings 0.05).
    """
    left = math.prod(dims)
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    deviation = np.float32(0.02)
    if scaled:
        embedding = name in ("model.embed_tokens.weight", "lm_head.weight")
        deviation = np.float32(0.05 if embedding else 1 / math.sqrt(math.prod(dims[1:])))
    while left:
        size = min(left, _BLOCK_ELEMENTS)
        if len(dims) == 1:
            yield np.full(size, 0 if name.endswith("bias") else 1, np.float32)
        else:
            yield rng.standard_normal(size, np.float32) * deviation
        left -= size


def _bfloat16(values: np.ndarray) -> bytes:
    """Round finite float32 values to bfloat16 (to nearest, ties to even); return little-endian bytes."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").tobytes()


def write_scene_tokenizer(folder: Path) -> None:
    """Write the tokenizer, processor and generation files of the `scenes` shape.

    A byte-level BPE in which every word of the captions, of the prompt and of the chat format is one token,
    and any other text is still representable, byte by byte.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    # The family's own splitting: the class that loads these files cuts words where training cut them.
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = sorted({word for text in [*all_words(), *_CHAT_WORDS] for word in text.split()})
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # an upper bound: training ends when every word is whole
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for word in words for text in (word, f" {word}")], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = trained["vocab"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in trained["merges"])]
    first = len(vocab)
    special = {
        str(first + index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    }
    ids = {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": special,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": (2 * PATCH_SIZE * MERGE_SIZE) ** 2,
            "max_pixels": (16 * PATCH_SIZE * MERGE_SIZE) ** 2,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "merge_size": MERGE_SIZE,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        },
    )


_CHAT_WORDS = (
    "system",
    "user",
    "assistant",
    "You are a helpful assistant.",
    "COCO Yes:",
    "Describe the picture.",
)


def _first_special_id(folder: Path) -> int:
    return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(shape: BaseShape) -> dict[str, Any]:
    """Return the numbers of a shape with its tensor count and bytes, for printing."""
    return {**asdict(shape), "tensors": sum(1 for _ in base_tensors(shape)), "bytes": base_bytes(shape)}
