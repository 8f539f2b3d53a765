"""Compare what a merged folder computes with what base + adapter computes, and with the base as a control.

The forward pass is transformers' own, in float32, but no weight is ever loaded whole: each linear layer reads its rows
block by block while it multiplies, so that a 7B is compared in the memory of its activations. The adapter stays beside
its weight, as in training: `W x + scaling * B (A x)`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.merge.apply_lora import TensorPlan, dora_factor, merged_rows, read_rows, row_blocks
from qwenvl_dist.merge.safetensors_writer import open_for_reading
from qwenvl_dist.model.base_folder import BaseFolder
from qwenvl_dist.model.names import EMBEDDING, LM_HEAD, runtime_name

PROMPTS = ("image", "text")
LENGTH = 24  # tokens of a prompt
MOST_ERROR = 0.5  # of the change: the merged model is at least twice as near to base + adapter as the base is


@dataclass(frozen=True)
class ForwardComparison:
    """Norms of one prompt's logits."""

    change: float  # ||base + adapter - base|| / ||base||
    error: float  # ||merged - (base + adapter)|| / ||base||
    control: float  # ||merged - base|| / ||base||
    same_best_token: float  # share of positions where merged and base + adapter agree


class _Weights:
    """Tensors of one folder by run-time name, in float32, with what a plan puts in their place."""

    def __init__(self, folder: BaseFolder, plans: dict[str, TensorPlan], stack: contextlib.ExitStack) -> None:
        self._files = {
            name: stack.enter_context(open_for_reading(folder.path / name)) for name in folder.files
        }
        self.plans = {runtime_name(name): plan for name, plan in plans.items()}
        if folder.tied:
            self.plans.setdefault(LM_HEAD, self.plans[EMBEDDING])

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows without their adapter."""
        plan = self.plans[name]
        rows = read_rows(self._files[plan.entry.file], plan.entry, plan.columns, begin, end)
        return merged_rows(replace(plan, delta=None), rows.to(torch.float32, copy=True), begin, end)

    def whole(self, name: str) -> torch.Tensor:
        """Return a small tensor with all that belongs to it."""
        plan = self.plans[name]
        return merged_rows(plan, self.rows(name, 0, plan.rows), 0, plan.rows).reshape(plan.entry.shape)


class _Streamed(nn.Module):
    """Base of layers whose weight stays on the disk."""

    weight = torch.empty(0)  # transformers asks for its type

    def __init__(self, weights: _Weights, name: str, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._weights, self._name, self._bias = weights, name, bias
        self._plan = weights.plans[name]


class _StreamedLinear(_Streamed):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        delta = self._plan.delta
        outputs = inputs.new_empty(*inputs.shape[:-1], self._plan.rows)
        low = None if delta is None else inputs @ delta.lora_a.T * delta.scaling
        for begin, end in row_blocks(self._plan):
            weight = self._weights.rows(self._name, begin, end)
            block = inputs @ weight.T
            if delta is not None and low is not None:
                block += low @ delta.lora_b[begin:end].T
                if delta.magnitude is not None:
                    whole = weight + delta.scaling * delta.lora_b[begin:end] @ delta.lora_a
                    block *= dora_factor(whole, delta.magnitude[begin:end]).to(torch.float32).T
            outputs[..., begin:end] = block
        return outputs if self._bias is None else outputs + self._bias


class _StreamedEmbedding(_Streamed):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        delta = self._plan.delta
        rows = torch.cat([self._weights.rows(self._name, i, i + 1) for i in ids.flatten().tolist()])
        if delta is not None:
            rows += delta.scaling * delta.lora_b[ids.flatten()] @ delta.lora_a
        return rows.reshape(*ids.shape, -1)


def compare_forward(
    base: BaseFolder, plans: dict[str, TensorPlan], out: Path
) -> dict[str, ForwardComparison]:
    """Return a comparison for each of PROMPTS.

    Raises:
        CheckFailed: the merged model does not do what base + adapter does, or does what the base did.
    """
    plain = {name: replace(plan, delta=None, trained=None) for name, plan in plans.items()}
    merged = BaseFolder(out)
    written = {name: TensorPlan(name, entry, entry.dtype) for name, entry in merged.tensors.items()}
    inputs = _inputs(base.config)
    of_base, trained, of_merged = (
        _logits(folder, plan, inputs) for folder, plan in ((base, plain), (base, plans), (merged, written))
    )
    result = {}
    for row, prompt in enumerate(PROMPTS):
        size = of_base[row].norm().item()
        result[prompt] = ForwardComparison(
            change=(trained[row] - of_base[row]).norm().item() / size,
            error=(of_merged[row] - trained[row]).norm().item() / size,
            control=(of_merged[row] - of_base[row]).norm().item() / size,
            same_best_token=(of_merged[row].argmax(-1) == trained[row].argmax(-1)).double().mean().item(),
        )
    _judge(out, result)
    return result


def _judge(out: Path, result: dict[str, ForwardComparison]) -> None:
    if not any(each.control > 0 for each in result.values()):
        raise CheckFailed(
            f"{out} computes the very logits of the base: training changed nothing that shows in it"
        )
    for prompt, each in result.items():
        # An adapter on the vision tower changes no text: there both sides are the base's.
        if not each.error <= MOST_ERROR * each.change:
            raise CheckFailed(
                f"{out}: on the {prompt} prompt its logits are {each.error:.2g} away from those of base + adapter, "
                f"which the adapter moved by {each.change:.2g}: what was trained is lost; if in rounding, "
                "--dtype float32 keeps it"
            )


def _inputs(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return one prompt with an image of 2 x 2 visual tokens and one of text alone, of fixed random tokens."""
    special = {key: config[f"{key}_token_id"] for key in ("image", "video", "vision_start", "vision_end")}
    vision, generator = config["vision_config"], torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(special.values()), (len(PROMPTS), LENGTH), generator=generator)
    ids[0, 2:8] = torch.tensor([special["vision_start"], *[special["image"]] * 4, special["vision_end"]])
    patch = (
        vision.get("in_channels", 3)
        * vision.get("temporal_patch_size", 2)
        * vision.get("patch_size", 14) ** 2
    )
    side = 2 * vision.get("spatial_merge_size", 2)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == special["image"]).long(),
        "pixel_values": torch.randn(side * side, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


@torch.no_grad()
def _logits(
    folder: BaseFolder, plans: dict[str, TensorPlan], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    with contextlib.ExitStack() as stack:
        return _streamed_model(folder, _Weights(folder, plans, stack))(**inputs, use_cache=False).logits


def _streamed_model(folder: BaseFolder, weights: _Weights) -> nn.Module:
    """Build transformers' model with its big layers streamed and all else in memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    config = AutoConfig.from_pretrained(folder.path)
    with init_empty_weights():  # buffers are computed
        model: nn.Module = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            bias = weights.whole(f"{name}.bias") if module.bias is not None else None
            model.set_submodule(name, _StreamedLinear(weights, f"{name}.weight", bias))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, _StreamedEmbedding(weights, f"{name}.weight"))
        else:
            for key, value in _own_values(module, name, weights):
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    return model


def _own_values(module: nn.Module, name: str, weights: _Weights) -> Iterator[tuple[str, torch.Tensor]]:
    for key, _ in list(module.named_parameters(recurse=False)):
        yield key, weights.whole(f"{name}.{key}")
