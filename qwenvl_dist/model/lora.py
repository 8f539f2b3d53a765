"""What trains: the adapter on the language model's projections, and parts of the base when a recipe names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import LoraConfig, ModelConfig

# Names at run time in transformers 5, below peft's prefix if there is an adapter.
_PART_PREFIXES = {
    "vision": ("model.visual.",),
    "merger": ("model.visual.merger.",),
    "language": ("model.language_model.",),
    "head": ("lm_head.",),
}


def make_trainable(model: Any, lora: LoraConfig | None, config: ModelConfig) -> nn.Module:
    """Freeze the base, add the adapter, thaw the named parts; return the model to train.

    `vision` is the tower without its merger. Raises UserError when a target or part matches nothing: peft itself stays
    silent as long as one target matches.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: nn.Module = model
    if lora is not None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for target in lora.target_modules:
            if not any(name == target or name.endswith("." + target) for name in names):
                ends = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise UserError(
                    f"lora.target_modules: {target!r} matches no linear layer of the base; it has {', '.join(ends)}"
                )
        import peft

        adapter = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  (peft takes fractions, its annotation does not)
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            bias="none",
        )
        trained = peft.get_peft_model(model, adapter, autocast_adapter_dtype=False)
    for part in config.train:
        if part == "head" and model.config.tie_word_embeddings:
            raise UserError(
                "model.train names `head`, but this base ties lm_head to the embedding; "
                "name `language`, which holds the embedding"
            )
        _thaw(trained, part)
    return trained


def part_of(name: str) -> str:
    """Return which part of a recipe's `train` a parameter belongs to; `vision` is the tower without its merger."""
    plain = name.removeprefix("base_model.model.")
    return next(
        part for part in ("merger", "vision", "language", "head") if plain.startswith(_PART_PREFIXES[part])
    )


def _thaw(model: nn.Module, part: str) -> None:
    count = 0
    for name, parameter in model.named_parameters():
        if part_of(name) == part:
            parameter.requires_grad_("lora_" not in name or parameter.requires_grad)
            count += 1
    if not count:
        raise UserError(f"model.train: the base has no parameters for part {part!r}")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def set_activation_checkpointing(model: Any, every: int) -> None:
    """Recompute each `every`-th language layer in the backward pass instead of keeping its activations; 0 for none.

    Non-reentrant, so that no input needs a gradient: the usual `enable_input_require_grads` also hooks the vision
    tower's patch embedding and makes a frozen tower differentiate and recompute itself.
    """
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    for number, layer in enumerate(model.model.language_model.layers):
        layer.gradient_checkpointing = bool(every) and number % every == 0
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
