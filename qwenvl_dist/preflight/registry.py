"""All checks in their order, by group; those that `train` makes itself; and how a choice of them is read."""

from __future__ import annotations

from collections.abc import Sequence

from qwenvl_dist.errors import UserError
from qwenvl_dist.preflight import data, environment, model, network, saving, step, storage
from qwenvl_dist.preflight.checks import Check

CHECKS = (
    Check(environment.packages_in_range, "environment", cheap=True),
    Check(environment.accelerator, "environment", cheap=True),
    Check(environment.same_versions, "environment", collective=True, cheap=True),
    Check(environment.same_code, "environment", collective=True, cheap=True),
    Check(environment.same_recipe, "environment", collective=True, cheap=True),
    Check(environment.clocks, "environment", collective=True, cheap=True),
    Check(environment.limits, "environment", cheap=True),
    Check(environment.shared_memory, "environment", cheap=True),
    Check(environment.compiled_ops, "environment"),
    Check(storage.output_folder, "storage", collective=True),
    Check(storage.atomic_files, "storage", needs=("output_folder",)),
    Check(data.manifests, "data", collective=True, cheap=True),
    Check(environment.disk_space, "storage", needs=("manifests",), cheap=True),
    Check(storage.write_speed, "storage", needs=("output_folder", "manifests")),
    Check(storage.node_cache, "storage", needs=("manifests",)),
    Check(data.sampled_shards, "data", needs=("manifests",), collective=True),
    Check(data.lengths, "data", needs=("manifests",)),
    Check(data.text_only, "data", needs=("manifests",)),
    Check(data.extremes, "data", needs=("manifests",)),
    Check(model.base_files, "model", collective=True, cheap=True),
    Check(model.base_tensor_names, "model", needs=("base_files",), cheap=True),
    Check(model.processor, "model", needs=("base_files",)),
    Check(model.adapter_targets, "model", needs=("base_files",), cheap=True),
    Check(model.memory, "model", needs=("manifests", "base_files", "adapter_targets")),
    Check(network.links, "network", needs=("manifests", "base_files"), collective=True),
    Check(
        step.model_loads,
        "step",
        collective=True,
        needs=(
            "manifests",
            "lengths",
            "base_tensor_names",
            "processor",
            "adapter_targets",
            "same_recipe",
            "same_code",
        ),
    ),
    Check(step.worst_batch, "step", needs=("model_loads",), collective=True),
    Check(step.rank_without_picture, "step", needs=("model_loads",), collective=True),
    Check(step.adapter_gradients, "step", needs=("model_loads",), collective=True),
    Check(step.loss_falls, "step", needs=("adapter_gradients",), collective=True),
    Check(step.loader_rate, "step", needs=("worst_batch",), collective=True),
    Check(
        saving.checkpoint,
        "checkpoint",
        collective=True,
        needs=("output_folder", "atomic_files", "disk_space", "loss_falls"),
    ),
)
CHEAP = tuple(check for check in CHECKS if check.cheap)


def choose(only: Sequence[str], without: Sequence[str]) -> list[Check]:
    """Return the checks that are named, by name or group, with those that they need; or all but some.

    Raises UserError for a name that is none.
    """
    known = {check.name for check in CHECKS} | {check.group for check in CHECKS}
    for name in (*only, *without):
        if name not in known:
            raise UserError(f"check {name}: is none; there are {', '.join(sorted(known))}")
    by_name = {check.name: check for check in CHECKS}
    chosen: set[str] = set()

    def add(check: Check) -> None:
        chosen.add(check.name)
        for name in check.needs:
            add(by_name[name])

    for check in CHECKS:
        if not only or check.name in only or check.group in only:
            add(check)
    return [
        check
        for check in CHECKS
        if check.name in chosen and check.name not in without and check.group not in without
    ]
