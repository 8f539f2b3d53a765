"""What trains: the adapter on the language model's projections, and parts of the base when a recipe names them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    import peft

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

    `vision` is the tower without its merger. Raises UserError when a name in the recipe matches nothing or more than it
    says: peft itself stays silent as long as one target matches.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained: nn.Module = model
    if lora is not None:
        from peft import get_peft_model

        excluded = _check_names(model, lora)
        trained = get_peft_model(
            model, peft_config(lora, exclude_modules=excluded or None), autocast_adapter_dtype=False
        )
    for part in config.train:
        if part == "head" and model.config.tie_word_embeddings:
            raise UserError(
                "model.train names `head`, but this base ties lm_head to the embedding; "
                "name `language`, which holds the embedding"
            )
        _thaw(trained, part)
    return trained


def peft_config(lora: LoraConfig, **more: Any) -> peft.LoraConfig:
    """Return peft's own description of a recipe's adapter."""
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  (peft takes fractions, its annotation does not)
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        lora_bias=lora.lora_bias,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),  # type: ignore[arg-type]  (as lora_alpha)
        modules_to_save=list(lora.modules_to_save) or None,
        bias="none",
        **more,
    )


def _is_end(end: str, name: str) -> bool:
    return name == end or name.endswith("." + end)


def _check_names(model: Any, lora: LoraConfig) -> list[str]:
    """Check what the adapter's names match; return the modules that a target names but that are not linear layers."""
    modules = {name: module for name, module in model.named_modules() if name}
    saved = _saved_modules(list(modules), lora.modules_to_save)
    inside = tuple(name + "." for name in saved)
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name not in saved and not name.startswith(inside)
    ]
    for target in lora.target_modules:
        if not any(_is_end(target, name) for name in linear):
            ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"lora.target_modules: {target!r} matches no linear layer of the base"
                f"{' outside lora.modules_to_save' if saved else ''}; it has {', '.join(ends)}"
            )
    matched = [name for name in modules if any(_is_end(target, name) for target in lora.target_modules)]
    adapted = [name for name in matched if name in linear]
    for name in adapted if lora.lora_bias else ():
        if modules[name].bias is None:
            raise UserError(
                f"lora.lora_bias: {name} has no bias of its own, so that one of its adapter could not be merged; "
                "target layers that have one (q_proj, k_proj, v_proj, the vision tower's), or drop lora_bias"
            )
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:  # peft.utils.other.get_pattern_key
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise UserError(
                    f"lora.{key}: {pattern!r} matches no module that the adapter is on, such as {adapted[0]}; "
                    "a pattern is a regular expression for the whole end of such a name"
                )
    if model.config.tie_word_embeddings:
        for key, names in (("target_modules", adapted), ("modules_to_save", saved)):
            for name in names:
                if name == "lm_head" or _is_end("embed_tokens", name):
                    raise UserError(
                        f"lora.{key} names {name}, but this base ties lm_head to the embedding: trained apart they "
                        "could not be merged; leave it out, or train a base with a head of its own"
                    )
    return [name for name in matched if not isinstance(modules[name], nn.Linear)]


def _saved_modules(names: list[str], ends: tuple[str, ...]) -> list[str]:
    """Return the modules of which peft trains copies; it goes by the end of the name alone, dots or not."""
    saved = [name for name in names if any(name.endswith(end) for end in ends)]
    for end in ends:
        found = [name for name in saved if _is_end(end, name)]
        if not found:
            raise UserError(
                f"lora.modules_to_save: {end!r} matches no module of the base; name one such as merger, "
                "model.language_model.norm, embed_tokens or lm_head"
            )
        more = [name for name in saved if name.endswith(end) and not _is_end(end, name)]
        if more:
            raise UserError(
                f"lora.modules_to_save: {end!r} also matches {more[0]} for peft, which looks at letters only; "
                f"name more of it, such as {found[0]}"
            )
    for outer in saved:
        for inner in saved:
            if inner.startswith(outer + "."):
                raise UserError(
                    f"lora.modules_to_save: {inner} is a part of {outer}, which is copied as a whole; name one of them"
                )
    return saved


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
            if ".original_module." in name:
                raise UserError(
                    f"model.train names {part!r}, of which lora.modules_to_save trains a copy ({name}); "
                    "name it in one of them"
                )
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
