"""Checks of the base: is it all there, is it one, and what will train on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qwenvl_dist.model.names import runtime_name
from qwenvl_dist.planning.shapes import parameters_of, shape_of
from qwenvl_dist.preflight.checks import Context, Verdict, fail, has_gpu, ok, warn
from qwenvl_dist.synthetic.base import base_tensors

if TYPE_CHECKING:
    from qwenvl_dist.planning.estimate import Choice

GIB = 1 << 30


def base_files(context: Context) -> Verdict:
    """All files of the base are there in full length, and the same on all ranks."""
    prints = context.of_all(lambda: context.base.fingerprint())  # fails for a file that is missing or cut off
    base = context.base
    for rank, other in enumerate(prints):
        if other != prints[0]:
            return fail(
                f"model.base = {context.recipe.model.base} has other files on {context.named([rank])} than on rank 0",
                "copy one base to all nodes, or keep it on storage that they share",
            )
    size = sum(tensor.nbytes for tensor in base.tensors.values())
    return ok(
        f"{len(base.tensors)} tensors in {len(base.files)} files, {size / GIB:.2f} GiB, {prints[0][:12]}"
    )


def base_tensor_names(context: Context) -> Verdict:
    """The base has the tensors, in the shapes, that its config.json asks for."""
    base = context.base
    shape = shape_of(base.config, context.recipe.model.base)
    wanted = {runtime_name(name): tuple(dims) for name, dims in base_tensors(shape)}
    found = {runtime_name(name): tuple(entry.shape) for name, entry in base.tensors.items()}
    remedy = "download the base again, config.json and weights of one revision"
    missing = sorted(set(wanted) - set(found))
    if missing:
        return fail(f"{len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}", remedy)
    for name, dims in wanted.items():
        if found[name] != dims:
            return fail(f"{name} has shape {list(found[name])}, config.json asks for {list(dims)}", remedy)
    more = sorted(set(found) - set(wanted) - {"lm_head.weight"})
    if more:
        return warn(f"{len(more)} tensors that the model does not use, such as {more[0]}", remedy)
    head = "lm_head tied to the embedding" if shape.tied else "an lm_head of its own"
    return ok(f"{len(wanted)} tensors, {sum(map(math.prod, wanted.values())) / 1e9:.2f} G parameters, {head}")


def processor(context: Context) -> Verdict:
    """Tokenizer and image processor of the base load, and know the tokens that its config.json names."""
    from qwenvl_dist.model.load import load_processor

    loaded: Any = load_processor(context.base.path)
    config, tokenizer = context.base.config, loaded.tokenizer
    for key, token in (
        ("image_token_id", "<|image_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        own = tokenizer.convert_tokens_to_ids(token)
        if key in config and config[key] != own:
            return fail(
                f"{token} is token {own}, config.json says {key} = {config[key]}",
                "take tokenizer and config.json of one revision of the base",
            )
    vocabulary = int({**config, **(config.get("text_config") or {})}["vocab_size"])
    if len(tokenizer) > vocabulary:
        return fail(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding {vocabulary} rows",
            "take tokenizer and weights of one revision of the base",
        )
    return ok(f"{len(tokenizer):,} tokens, patches of {loaded.image_processor.patch_size} pixels")


def adapter_targets(context: Context) -> Verdict:
    """Each target of the adapter matches linear layers; how many of them are in the vision tower."""
    recipe = context.recipe
    parameters = parameters_of(
        shape_of(context.base.config, recipe.model.base), recipe
    )  # raises for no match
    if recipe.lora is None:
        trained = sum(p.numel for p in parameters if p.trains)
        return ok(f"no adapter: {trained / 1e6:,.1f} M parameters of {', '.join(recipe.model.train)} train")
    modules = {p.name.partition(".lora_A")[0] for p in parameters if ".lora_A" in p.name}
    tower = sorted(name for name in modules if name.startswith("model.visual."))
    count = sum(p.numel for p in parameters if p.part == "adapter")
    shown = (
        f"{len(modules)} layers, {count / 1e6:,.3f} M parameters; {len(tower)} of them in the vision tower"
    )
    return ok(shown)


def memory(context: Context) -> Verdict:
    """What the plan counts fits into the memory of each device."""
    choice = context.plan.recipes
    needed, room, what = _needed_and_room(context, choice)
    shown = f"about {needed / GIB:.1f} GiB of {room / GIB:.1f} {what}, {choice.name}"
    remedy = "qwenvl-dist plan tells what fits: model.checkpointing, data.micro_batch_size, ZeRO-3, offload"
    if needed > room:
        return fail(shown, remedy)
    if needed > 0.9 * room:
        return warn(shown, remedy)
    return ok(shown)


def _needed_and_room(context: Context, choice: Choice) -> tuple[int, int, str]:
    """Return bytes needed by the fullest device, bytes there, and whose they are."""
    if has_gpu():
        import torch

        _, total = torch.cuda.mem_get_info(context.topology.local_rank)
        return choice.memory.peak, total, "of its GPU"
    import psutil

    ranks = next(ranks for ranks in context.nodes if context.host.rank in ranks)
    states = choice.memory.states
    needed = (choice.memory.peak + states.host) * len(ranks)
    return needed, psutil.virtual_memory().available, f"of the node's memory for {len(ranks)} ranks"
