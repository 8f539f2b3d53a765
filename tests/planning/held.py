"""What real ranks hold: a training step under any ZeRO stage, its tensors counted on each rank."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any


def run_cases(recipes: list[str], out: str) -> None:
    """One rank: make two optimizer steps of each recipe; leave what this rank held as `RECIPE.RANK.json` in `out`."""
    import torch

    from qwenvl_dist.config import load_recipe

    launched = dict(os.environ)
    rank = os.environ["RANK"]
    for path in recipes:
        os.environ.clear()
        os.environ.update(launched)  # accelerate leaves words there
        found = _measure(load_recipe(path))
        Path(out, f"{Path(path).stem}.{rank}.json").write_text(json.dumps(found))
        _forget()
    torch.distributed.destroy_process_group()


def _measure(recipe: Any) -> dict[str, int]:
    from qwenvl_dist import distributed
    from qwenvl_dist.model.load import resolve_base
    from qwenvl_dist.training.run import assemble
    from qwenvl_dist.training.step import train_step

    accelerator = _start(recipe)
    host = distributed.HostGroup(120)
    state = assemble(
        recipe, accelerator, distributed.Topology.from_environment(), host, resolve_base(recipe.model.base)
    )
    state.engine.train()
    held: dict[str, int] = {}
    zero = state.engine.optimizer
    step = zero.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        held.update(_held(state.engine, zero))
        return step(*args, **kwargs)

    zero.step = counted
    steps = state.batches.iterate()
    for _ in range(2):  # moments are made in the first
        micro_batches = next(steps)
        tokens, samples = host.sum(
            sum(b.target_tokens for b in micro_batches), sum(len(b.keys) for b in micro_batches)
        )
        train_step(state, micro_batches, 1e-4, tokens, samples)
    return held


def _start(recipe: Any) -> Any:
    """Start under any stage: 1 too, which the toolkit refuses."""
    from qwenvl_dist import distributed

    file = Path(recipe.deepspeed.config)
    zero = json.loads(file.read_text())["zero_optimization"]
    if zero["stage"] != 1:
        return distributed.start(recipe)
    two = file.with_suffix(f".{os.environ['RANK']}.json")
    two.write_text(json.dumps({"zero_optimization": {**zero, "stage": 2}}))
    section = recipe.deepspeed.model_copy(update={"config": str(two)})
    config = distributed.deepspeed_config(recipe.model_copy(update={"deepspeed": section}))
    config["zero_optimization"]["stage"] = 1
    configured = distributed.deepspeed_config
    distributed.deepspeed_config = lambda _: config
    try:
        return distributed.start(recipe)
    finally:
        distributed.deepspeed_config = configured


def _bytes(tensors: Any) -> dict[int, int]:
    """Return the storages of tensors, by address, and their bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return found


def _held(engine: Any, zero: Any) -> dict[str, int]:
    import torch

    parameters = list(engine.module.parameters())
    weights = _bytes(
        [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    )
    stage = engine.zero_optimization_stage()
    if stage == 3:
        masters = list(zero.fp32_partitioned_groups_flat)
        gradients = _bytes([zero.grad_partitions_flat_buffer])
    else:
        masters = list(zero.single_partition_of_fp32_groups)
        averaged = [g for group in zero.averaged_gradients.values() for g in group]
        gradients = _bytes(averaged)
        # Under stage 1 those of other ranks' slices may be views of a bucket.
        own = [
            p.grad
            for p in parameters
            if p.grad is not None and p.grad.untyped_storage()._cdata not in gradients
        ]
        gradients |= {-number: grad.numel() * grad.element_size() for number, grad in enumerate(own, 1)}
    moments = [
        v for s in zero.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1
    ]
    optimizer = {k: v for k, v in _bytes([*(m.data for m in masters), *moments]).items() if k not in weights}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
    }


def _forget() -> None:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()
