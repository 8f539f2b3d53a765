"""Tensor names: hub files, newer files, training and peft each say the same thing differently.

| where                          | an example                                                             |
|--------------------------------|------------------------------------------------------------------------|
| hub files                      | `model.layers.0.mlp.up_proj.weight`, `visual.patch_embed.proj.weight`  |
| transformers 5 and newer files | `model.language_model.layers.0...`, `model.visual.patch_embed...`      |
| peft                           | `base_model.model.` before the run-time name, `.base_layer` inside,    |
|                                | `.modules_to_save.default` inside for the trained copy of a module     |

The run-time name is the one all others are compared by.
"""

PEFT_PREFIX = "base_model.model."
LM_HEAD = "lm_head.weight"
SAVED_COPY = ".modules_to_save.default."
EMBEDDING = "model.language_model.embed_tokens.weight"


def runtime_name(name: str) -> str:
    """Return the name that transformers 5 gives a tensor (or module) at run time, from any of its names."""
    name = name.replace("_orig_mod.", "")  # torch.compile
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(SAVED_COPY, ".")
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def hub_name(name: str) -> str:
    """Return the name of the hub's files for a run-time name."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
