"""Checks of the checkpoint: written, whole, read back, merged."""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import UserError
from qwenvl_dist.preflight.checks import Context, Found, Status, Verdict, fail, ok

if TYPE_CHECKING:
    import torch

    from qwenvl_dist.training.checkpoint import Checkpoints

MIB = 1 << 20
MERGED_TENSORS = 2  # of the base, to try the merge on


def checkpoint(context: Context) -> Verdict:
    """A checkpoint is written beside the run, verified, read back into the same state, and merges into the base."""
    from qwenvl_dist.training.output_folder import ranks_elsewhere

    if context.state is None:
        raise Found(Verdict(Status.SKIPPED, "needs model_loads, which was left out"))
    elsewhere = ranks_elsewhere(context.run, context.host, context.recipe.train.output_shared)
    name = context.host.from_main(uuid.uuid4().hex)
    folder = context.run / f".preflight-{name}"
    try:
        return _try(context, folder, elsewhere)
    finally:
        context.host.barrier()  # nobody reads any more
        if context.topology.is_main or elsewhere:
            shutil.rmtree(folder, ignore_errors=True)


def _try(context: Context, folder: Path, elsewhere: list[int]) -> Verdict:
    from qwenvl_dist.checkpoints import manifest as manifests

    state: Any = context.state
    checkpoints = _checkpoints(context, folder, elsewhere)
    began = time.perf_counter()
    checkpoints.save()  # raises on all ranks alike
    written = time.perf_counter() - began
    step = manifests.step_folder(checkpoints.folder, state.progress.step)
    before = _values(state)
    began = time.perf_counter()
    _spoil(state)
    checkpoints.resume()
    read = time.perf_counter() - began
    after = _values(state)
    differing = sorted(key for key, value in before.items() if after[key] != value)
    everyone = context.host.gather(differing)
    if any(everyone):
        rank, names = next((rank, names) for rank, names in enumerate(everyone) if names)
        return fail(
            f"{len(names)} tensors of {context.named([rank])} came back changed, such as {names[0]}",
            "a resume would not go on where it stopped; look at the storage of train.output_dir",
        )
    merged = context.of_all(lambda: _merge(context, step) if context.topology.is_main else "")[0]
    size = context.of_all(
        lambda: (
            sum(path.stat().st_size for path in manifests.files_below(step))
            if context.topology.is_main
            else 0
        )
    )[0]
    return ok(
        f"{size / MIB:.1f} MiB written and verified in {written:.2f} s, read back in {read:.2f} s; {merged}"
    )


def _checkpoints(context: Context, folder: Path, elsewhere: list[int]) -> Checkpoints:
    """Return a checkpoints folder of its own, written and read as a run does."""
    from dataclasses import replace

    from qwenvl_dist.training.checkpoint import Checkpoints

    assert context.state is not None
    recipe = context.recipe
    train = recipe.train.model_copy(
        update={"output_dir": str(folder), "resume": "auto", "checkpoint_async": False}
    )
    folder.mkdir(parents=True, exist_ok=True)
    apart = replace(context.state, recipe=recipe.model_copy(update={"train": train}))
    return Checkpoints(apart, context.base.path, elsewhere)


def _values(state: Any) -> dict[str, bytes]:
    """Return the bytes of what this rank holds of the optimizer's state."""
    found = {}
    for number, (_, moments) in enumerate(state.engine.optimizer.optimizer.state.items()):
        for key, value in moments.items():
            if hasattr(value, "numel") and value.numel() > 1:
                found[f"{number}.{key}"] = value.detach().cpu().numpy().tobytes()
    for number, master in enumerate(_masters(state)):
        found[f"master {number}"] = master.detach().cpu().numpy().tobytes()
    return found


def _masters(state: Any) -> list[torch.Tensor]:
    zero = state.engine.optimizer
    if state.engine.zero_optimization_stage() == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _spoil(state: Any) -> None:
    """Change the masters, so that reading them back shows."""
    for master in _masters(state):
        master.data.add_(1.0)


def _merge(context: Context, step: Path) -> str:
    """Merge a few tensors of the checkpoint into the base in memory; return what that showed."""
    import torch

    from qwenvl_dist.merge.apply_lora import make_plan, merged_rows, read_rows
    from qwenvl_dist.merge.merge import check_base
    from qwenvl_dist.merge.trained import read_trained

    began = time.perf_counter()
    trained, base = read_trained(step), context.base
    check_base(trained, base)
    plans = [plan for plan in make_plan(base, trained, None).values() if plan.merged]
    changed = 0.0
    for plan in plans[:MERGED_TENSORS]:
        with (base.path / plan.entry.file).open("rb") as file:
            rows = read_rows(file.fileno(), plan.entry, plan.columns, 0, plan.rows).float()
        merged = merged_rows(plan, rows.clone(), 0, plan.rows)
        if not torch.isfinite(merged).all():
            raise UserError(f"{plan.name}: merged values are not finite; look at the adapter's gradients")
        changed = max(changed, float((merged - rows).abs().max()))
    if not changed:
        raise Found(
            fail(
                f"a merge of {len(plans)} tensors would change nothing",
                "the adapter did not learn in the steps before: look at adapter_gradients and loss_falls",
            )
        )
    seconds = time.perf_counter() - began
    return f"{len(plans)} tensors would merge, at most {changed:.1e} apart from the base, {seconds:.2f} s"
