"""A plan as tables for a person, and as plain values for a script."""

from __future__ import annotations

from typing import Any

from qwenvl_dist.planning.estimate import FRAGMENTATION, FRAMEWORK_BYTES, GIB, Choice, Plan, advice
from qwenvl_dist.planning.shapes import PARTS

ALL_PARTS = (*PARTS, "adapter")


def rows_of(choice: Choice) -> dict[str, int]:
    """Return the bytes of a choice by name, on the GPU; `decoder`, `logits` and `vision tower` take turns."""
    states, act = choice.memory.states, choice.memory.activations
    return {
        "weights": states.weights,
        "adapter": states.adapter,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "gathered weights": states.gathered,
        "communication buffers": states.buffers,
        "activations kept": act.kept,
        "backward pass": act.working,
        "logits": act.logits,
        "vision tower": act.tower,
        "framework": choice.memory.framework,
    }


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain JSON types; bytes and FLOPs are whole numbers, everything else says its unit."""
    data, work, written = plan.data, plan.arithmetic, plan.checkpoints
    fastest = plan.fastest
    return {
        "gpus_per_node": plan.gpus,
        "nodes": plan.nodes,
        "gpu_memory_bytes": plan.gpu_memory,
        "parameters": {
            part: {"frozen": plan.count(part, False), "trained": plan.count(part, True)} for part in ALL_PARTS
        },
        "data": {
            "samples": data.samples,
            "shards": data.shards,
            "shards_read": data.shards_read,
            "sources": {name: vars(source) for name, source in data.sources.items()},
            "text_only_share": data.text_only_share,
            "tokens_per_sample": data.tokens_per_sample,
            "visual_tokens_per_sample": data.visual_tokens_per_sample,
            "target_tokens_per_epoch": round(data.target_tokens_per_sample * data.samples),
            "target_tokens": round(data.target_tokens_per_sample * data.total_samples),
            "padding_share": data.padding_share,
            "largest_micro_batch": {
                "samples": data.largest.samples,
                "length": data.largest.length,
                "target_tokens": data.largest.targets,
                "visual_tokens": data.largest.visual_tokens,
            },
        },
        "steps": {
            "global_batch_size": data.global_batch_size,
            "grad_accum_steps": data.grad_accum_steps,
            "per_epoch": data.steps_per_epoch,
            "total": data.total_steps,
        },
        "choices": [
            {
                "name": choice.name,
                "stage": choice.settings.stage,
                "trainable": choice.can_train,
                "recipes": choice.is_recipes,
                "fits": choice.fits,
                "peak_bytes": choice.memory.peak,
                "parts_bytes": rows_of(choice),
                "host_bytes_per_node": choice.memory.states.host * plan.gpus,
                "nvme_bytes_per_node": choice.memory.states.nvme * plan.gpus,
                "gathered_bytes_per_micro_batch": choice.gathered_bytes,
                "traffic_seconds_per_step": choice.traffic_seconds,
            }
            for choice in plan.choices
        ],
        "fastest": fastest.name if fastest else None,
        "checkpoints": {
            "bytes": written.bytes,
            "files": written.files,
            "written": written.written,
            "on_disk": written.on_disk,
            "disk_bytes": written.disk_bytes,
            "disk_files": written.disk_files,
        },
        "arithmetic": {
            "flops_per_step": round(work.flops_per_step),
            "recomputed_share": work.recomputed_share,
            "gpu": work.gpu,
            "peak_flops": round(work.peak_flops),
            "mfu": work.mfu,
            "seconds_per_step": work.seconds_per_step,
            "days": work.days,
        },
        "advice": advice(plan),
    }


def text(plan: Plan) -> str:
    """Return the plan as tables."""
    recipe, data, work, written = plan.recipe, plan.data, plan.arithmetic, plan.checkpoints
    lines = [f"{recipe.model.base} on {plan.nodes} x {plan.gpus} GPUs of {plan.gpu_memory / GIB:g} GiB", ""]
    lines += _columns(
        [["parameters, M", "frozen", "trained"]]
        + [
            [part, f"{plan.count(part, False) / 1e6:,.3f}", f"{plan.count(part, True) / 1e6:,.3f}"]
            for part in ALL_PARTS
            if plan.count(part, False) + plan.count(part, True)
        ]
    )
    read = "" if data.shards_read == data.shards else f", lengths from {data.shards_read} of them"
    target = data.target_tokens_per_sample
    ranks = f"{plan.world_size} ranks x {recipe.data.micro_batch_size} x {data.grad_accum_steps}"
    tokens = f"{target * data.samples:,.0f} target tokens an epoch, {target * data.total_samples:,.0f} in all"
    lines += [
        "",
        f"data         {data.samples:,} samples in {data.shards:,} shards{read}",
        *(
            f"             {name}: {source.samples_per_epoch:,} an epoch from {source.samples:,} samples, "
            f"{source.passes:.3g} passes in all epochs"
            for name, source in data.sources.items()
        ),
        f"             about {data.tokens_per_sample:.0f} tokens a sample: {data.visual_tokens_per_sample:.0f} visual, "
        f"{target:.0f} learned; {data.text_only_share:.1%} without a picture; {data.padding_share:.1%} padding",
        f"steps        {data.steps_per_epoch:,} an epoch, {data.total_steps:,} in all, of "
        f"{data.global_batch_size:,} samples ({ranks})",
        f"             about {tokens}",
        f"arithmetic   {work.flops_per_step / 1e12:,.1f} TFLOP a step; {work.seconds_per_step:.2f} s a step and "
        f"{work.days:.2f} days at {work.mfu:.0%} of {work.peak_flops / 1e12:,.0f} TFLOP/s ({work.gpu})",
        f"checkpoints  {describe_bytes(written.bytes)} in {written.files} files each, {written.written:,} written, at "
        f"most {written.on_disk} at a time: {describe_bytes(written.disk_bytes)}, {written.disk_files:,} files and "
        "folders",
        "",
    ]
    largest = data.largest
    lines.append(
        f"GiB of the fullest GPU, at the largest micro-batch ({largest.samples} samples x {largest.length} tokens, "
        f"{largest.targets} targets, {largest.visual_tokens} visual tokens), "
        f"model.checkpointing={recipe.model.checkpointing}:"
    )
    lines.append("")
    table = [["", "wei.", "adap.", "grad.", "opt.", "gath.", "comm.", "kept", "backw.", "logits", "tower",
              "frame.", "peak", "host", "NVMe", "fits"]]  # fmt: skip
    for choice in plan.choices:
        states = choice.memory.states
        mark = "yes" if choice.fits else "no"
        if choice.fits and choice is plan.fastest:
            mark = "fastest"
        if not choice.can_train:
            mark += ", but train refuses it"
        table.append(
            [("* " if choice.is_recipes else "  ") + choice.name]
            + [_gib(size) for size in rows_of(choice).values()]
            + [_gib(choice.memory.peak), _gib(states.host * plan.gpus), _gib(states.nvme * plan.gpus), mark]
        )
    lines += _columns(table)
    lines += [
        "",
        "* as the recipe says. The peak counts the largest of: kept + backward pass, kept + logits, the tower alone.",
        f"Frame: {FRAMEWORK_BYTES / GIB:g} GiB for CUDA, NCCL and kernels and {FRAGMENTATION:.0%} lost to "
        "fragmentation, assumed, not measured. Host and NVMe are of a node.",
        "",
    ]
    return "\n".join([*lines, *advice(plan)])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def describe_bytes(size: int) -> str:
    """Return bytes for a person."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / (1 << 20):.1f} MiB"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i == 0 or (i == last and len(row) > 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
