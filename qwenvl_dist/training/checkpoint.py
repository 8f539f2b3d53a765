"""Write, verify, find, resume and rotate checkpoints.

DeepSpeed writes its own partition files, of what trains only; the manifest around them makes a step folder whole or
absent, never half. Reading goes by parameter name, so a run resumes on any number of ranks and any ZeRO stage.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwenvl_dist.checkpoints import manifest as manifests
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.files import fsync
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.base_folder import BaseFolder
from qwenvl_dist.model.load import save_processor
from qwenvl_dist.model.lora import trainable_parameters
from qwenvl_dist.training.state import data_state, restore_progress

if TYPE_CHECKING:
    from qwenvl_dist.config import LoraConfig
    from qwenvl_dist.distributed import HostGroup
    from qwenvl_dist.training.state import TrainState

log = get_logger(__name__)
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "webdataset")


class CheckpointError(CheckFailed):
    """A checkpoint could not be written; earlier ones are untouched."""


def require_shared_folder(run: Path, host: HostGroup) -> None:
    """Raise UserError on all ranks when they do not see one and the same output folder. Collective."""
    token = run / ".shared-folder-token"
    failure = ""
    if host.rank == 0:
        try:
            run.mkdir(parents=True, exist_ok=True)
            token.write_text("", encoding="utf-8")
        except OSError as error:
            failure = f"train.output_dir = {run}: cannot be written ({error.strerror}); choose another folder"
    failure = host.from_main(failure)
    if not failure:
        blind = [rank for rank, seen in enumerate(host.gather(token.exists())) if not seen]
        if blind:
            failure = (
                f"train.output_dir = {run}: ranks {blind} do not see what rank 0 writes there; "
                "use a folder on storage that all nodes share"
            )
    host.barrier()
    if host.rank == 0:
        token.unlink(missing_ok=True)
    if failure:
        raise UserError(failure)


@contextlib.contextmanager
def _only_trained(model: nn.Module) -> Iterator[None]:
    """Keep frozen tensors out of `state_dict`.

    DeepSpeed's exclude_frozen_parameters works by the names of `named_parameters`, which lists a tied head once: under
    ZeRO-2 the other name would carry the whole embedding into every checkpoint.
    """
    names = set(trainable_parameters(model))

    def keep_trained(
        _module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: dict[str, Any]
    ) -> None:
        for name in [name for name in state if name not in names]:
            del state[name]

    handle = model.register_state_dict_post_hook(keep_trained)
    try:
        yield
    finally:
        handle.remove()


def unused_name(path: Path) -> Path:
    """Return `path`, with a number behind it when that name is taken."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _owner(name: str) -> int:
    """Return the rank that wrote a DeepSpeed file."""
    found = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(found.group(1)) if found else 0


class Checkpoints:
    """The checkpoints folder of one run."""

    def __init__(self, state: TrainState, base: Path) -> None:
        self.state = state
        self.folder = Path(state.recipe.train.output_dir) / "checkpoints"
        self.base = {"path": state.recipe.model.base, "fingerprint": BaseFolder(base).fingerprint()}
        self.last_saved: int | None = None

    # --- writing -----------------------------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Write the current step's checkpoint, point `best` at it if it is, rotate. Collective.

        Raises CheckpointError on all ranks when one of them could not write; earlier checkpoints stay as they are.
        """
        state = self.state
        final = manifests.step_folder(self.folder, state.progress.step)
        partial = self.folder / f".{final.name}.partial"
        if state.topology.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        state.host.barrier()
        failure, files = "", {}
        try:
            files = self._write_partitions(partial)
        except (OSError, RuntimeError) as error:  # torch's writer says "RuntimeError" for a full disk
            failure = f"rank {state.topology.rank}: {error}"
        answers = state.host.gather((failure, files))
        failures = [failure for failure, _ in answers if failure]
        if not failures and state.topology.is_main:
            try:
                self._publish(
                    partial, final, {k: v for _, part in answers for k, v in part.items()}, val_loss
                )
                self._point_best(final, val_loss)
                self._rotate()
            except OSError as error:
                failures = [f"rank 0: {error}"]
        failures = state.host.from_main(failures)
        if failures:
            if state.topology.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of step {state.progress.step} could not be written: {failures[0]}; "
                "earlier checkpoints are untouched, mend the storage and start again to resume"
            )
        self.last_saved = state.progress.step
        log.info("step %d: checkpoint written to %s", state.progress.step, final)

    def _write_partitions(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Let DeepSpeed write; return what this rank wrote, each file forced to the disk and described. Collective."""
        with _only_trained(self.state.engine.module):
            self.state.engine.save_checkpoint(
                str(partial), tag=manifests.PARTITIONS, exclude_frozen_parameters=True
            )
        self.state.host.barrier()
        mine = {}
        for path in manifests.files_below(partial / manifests.PARTITIONS):
            if _owner(path.name) == self.state.topology.rank:
                fsync(path)
                mine[str(path.relative_to(partial))] = manifests.describe_file(path)
        return mine

    def _publish(self, partial: Path, final: Path, files: dict[str, Any], val_loss: float | None) -> None:
        """Add what one rank writes for all, then the manifest, then give the folder its name. Rank 0 only."""
        state, recipe = self.state, self.state.recipe
        for script in partial.glob("*.py"):  # DeepSpeed's own converters; here it is `qwenvl-dist merge`
            script.unlink()
        adapter = getattr(state.engine.module, "peft_config", None)
        if adapter is not None:
            adapter["default"].save_pretrained(str(partial))
        save_processor(state.processor, recipe.data.image_size, partial / "processor")
        for path in manifests.files_below(partial):
            name = str(path.relative_to(partial))
            if name not in files:
                fsync(path)
                files[name] = manifests.describe_file(path)
        content = {
            "step": state.progress.step,
            "world_size": state.topology.world_size,
            "zero_stage": state.engine.zero_optimization_stage(),
            "dtype": recipe.model.dtype,
            "versions": {package: version(package) for package in _PACKAGES},
            "base": self.base,
            "lora": recipe.lora.model_dump(mode="json") if recipe.lora else None,
            "data": data_state(state.progress, state.identity),
            "progress": {
                "global_batch_size": state.batches.layout.global_batch_size,
                "best_val_loss": state.progress.best_val_loss,
            },
            "val_loss": val_loss,
            "files": dict(sorted(files.items())),
        }
        manifests.write_manifest(partial, content)
        if final.exists():  # an invalid checkpoint of this step, which the resume passed over
            stale = final.with_name(f".{final.name}.stale")
            shutil.rmtree(stale, ignore_errors=True)
            final.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)
        partial.rename(final)
        fsync(self.folder)

    def _point_best(self, final: Path, val_loss: float | None) -> None:
        if val_loss is None or val_loss != self.state.progress.best_val_loss:
            return
        link = self.folder / manifests.BEST
        fresh = self.folder / f".{manifests.BEST}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(final.name)
        fresh.replace(link)

    def _rotate(self) -> None:
        """Remove the oldest checkpoints beyond the number to keep; never the best or the newest."""
        best = (self.folder / manifests.BEST).resolve()
        for folder in manifests.step_folders(self.folder)[self.state.recipe.train.keep_checkpoints :]:
            if folder.resolve() != best:
                gone = folder.with_name(f".{folder.name}.removed")
                folder.rename(gone)  # at once, so that a kill in the middle leaves no half checkpoint
                shutil.rmtree(gone, ignore_errors=True)

    # --- reading -----------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Load the checkpoint that the recipe asks for, if there is one. Collective; tells whether it did."""
        wanted = self.state.recipe.train.resume
        found: tuple[str | None, dict[str, Any], str] = (None, {}, "")
        if self.state.topology.is_main and wanted != "never":
            found = self._find(wanted)
        folder, manifest, failure = self.state.host.from_main(found)
        if failure:
            raise UserError(failure)
        if folder is None:
            return False
        self.state.progress = restore_progress(manifest, self.state.identity, folder)
        if manifest["base"]["fingerprint"] != self.base["fingerprint"]:
            raise UserError(
                f"resume from {folder}: it was trained on base {manifest['base']['path']}, whose files differ from "
                f"{self.base['path']}; name that base, or start another run in another train.output_dir"
            )
        require_same_adapter(manifest["lora"], self.state.recipe.lora, folder)
        load_trained_state(self.state.engine, ZeroCheckpoint(folder))
        best = self._set_aside_later() if self.state.topology.is_main else None
        self.state.progress.best_val_loss = self.state.host.from_main(best)
        self.last_saved = self.state.progress.step
        log.info("resumed from %s: step %d", folder, self.state.progress.step)
        return True

    def _set_aside_later(self) -> float | None:
        """Move damaged or undone checkpoints of later steps to `discarded/`; return the best validation loss left.

        Rotation would count them among the newest, and the next resume take one of a history that is no more. When the
        best was among them, `best` points to the best of the others. Rank 0 only.
        """
        remaining = []
        for folder in manifests.step_folders(self.folder):
            if int(folder.name.removeprefix("step-")) > self.state.progress.step:
                target = unused_name(self.folder.parent / "discarded" / self.folder.name / folder.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(target)
                log.warning("resume: moved %s, which comes after it, to %s", folder.name, target)
            else:
                remaining.append(folder)
        link = self.folder / manifests.BEST
        if link.is_symlink() and not link.exists():
            link.unlink()
            losses = []
            for folder in remaining:
                with contextlib.suppress(manifests.InvalidCheckpoint):
                    losses.append((manifests.read_manifest(folder)["val_loss"], folder))
            known = [(loss, folder) for loss, folder in losses if loss is not None]
            if not known:
                return None
            loss, folder = min(known)
            link.symlink_to(folder.name)
            return loss
        return self.state.progress.best_val_loss

    def _find(self, wanted: str) -> tuple[str | None, dict[str, Any], str]:
        if wanted == "auto":
            folder, manifest, skipped = manifests.newest_valid(self.folder)
            for line in skipped:
                log.warning("resume: skipped %s", line)
            if folder is None and skipped:
                return None, {}, (
                    f"resume: none of the {len(skipped)} checkpoints in {self.folder} is whole; "
                    "restore one, or set train.resume=never to start again"
                )  # fmt: skip
            return (str(folder) if folder else None), manifest, ""
        try:
            return wanted, manifests.verify(Path(wanted)), ""
        except manifests.InvalidCheckpoint as error:
            return None, {}, f"train.resume = {wanted}: {error}; name a whole step folder, or use auto"


def require_same_adapter(written: dict[str, Any] | None, lora: LoraConfig | None, folder: str) -> None:
    """Raise UserError when the adapter has another shape or scaling than the checkpoint's."""
    if written is None or lora is None:
        return  # the names of the trained tensors tell
    before = type(lora).model_validate(written)  # an older checkpoint leaves out what was not there yet
    for key in type(lora).model_fields:
        if key in ("dropout", "target_modules"):
            continue  # free to change; told by the names of the trained tensors
        if getattr(before, key) != getattr(lora, key):
            raise UserError(
                f"lora.{key} = {getattr(lora, key)}: the checkpoint {folder} was trained with "
                f"{getattr(before, key)}; "
                "set it back, or start another run in another train.output_dir"
            )


def load_trained_state(engine: Any, checkpoint: ZeroCheckpoint) -> None:
    """Set masters, weights and Adam's moments from a checkpoint of any world size and ZeRO stage. Collective.

    Each rank reads the slices it needs and keeps its own partition. DeepSpeed's own loading wants the same world size.
    """
    import deepspeed
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    parameters = trainable_parameters(engine.module)
    missing = sorted(set(parameters) - set(checkpoint.shapes))
    extra = sorted(set(checkpoint.shapes) - set(parameters))
    if missing or extra:
        name = (missing or extra)[0]
        raise UserError(
            f"resume from {checkpoint.folder}: {len(missing)} trained tensors are missing there and {len(extra)} are "
            f"not trained now (first: {name}); use the lora and model.train sections of that run"
        )
    zero = engine.optimizer
    stage = engine.zero_optimization_stage()
    partitions = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    steps = {checkpoint.optimizer_step(name) for name in parameters}
    assert len(steps) == 1, f"parameters disagree about Adam's step: {steps}"
    _prepare_adam_state(zero.optimizer, partitions, steps.pop())

    if stage != 3:
        zero._lazy_init_hp_params_optimizer_state()  # links each parameter to its slice of the moments just made
        for name, parameter in parameters.items():
            master = checkpoint.fp32(name)
            safe_set_full_fp32_param(parameter, master.to(parameter.device))
            parameter.data.copy_(master)
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, checkpoint.optimizer_state(name, key), key)
        return

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def own_slice(tensor: torch.Tensor, size: int) -> torch.Tensor:
        padded = torch.zeros(size * world, dtype=torch.float32)
        padded[: tensor.numel()] = tensor.flatten()
        return padded[rank * size : (rank + 1) * size]

    for name, parameter in parameters.items():
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        safe_set_local_fp32_param(parameter, own_slice(checkpoint.fp32(name), size))
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_local_optimizer_state(
                parameter, own_slice(checkpoint.optimizer_state(name, key), size), key
            )
    with deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0):
        if rank == 0:
            for name, parameter in parameters.items():
                parameter.data.copy_(checkpoint.fp32(name))


def _prepare_adam_state(adam: torch.optim.Optimizer, partitions: list[torch.Tensor], step: int) -> None:
    """Create Adam's state for each flat partition, as its first step would, with zero moments."""
    on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    for partition in partitions:
        count = torch.tensor(float(step), device=partition.device if on_device else "cpu")
        adam.state[partition] = {
            "step": count if isinstance(adam, torch.optim.AdamW) else step,
            "exp_avg": torch.zeros_like(partition.data),
            "exp_avg_sq": torch.zeros_like(partition.data),
        }
