"""Tensor names: hub files, newer files, training and peft each say the same thing differently.

| where                          | an example                                                             |
|--------------------------------|------------------------------------------------------------------------|
| hub files                      | `model.layers.0.mlp.up_proj.weight`, `visual.patch_embed.proj.weight`  |
| transformers 5 and newer files | `model.language_model.layers.0...`, `model.visual.patch_embed...`      |
| peft                           | `base_model.model.` before the run-time name, `.base_layer` inside     |

The run-time name is the one all others are compared by.
"""

PEFT_PREFIX = "base_model.model."
LM_HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def runtime_name(name: str) -> str:
    """Return the name that transformers 5 gives a tensor (or module) at run time, from any of its names."""
    name = name.replace("_orig_mod.", "")  # torch.compile
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name
