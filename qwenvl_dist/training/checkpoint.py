"""When and what a run saves, which checkpoint it resumes, and which ones stay.

DeepSpeed says what belongs into its partition files, of what trains only; `checkpoints/publish.py` writes them and
makes a step folder whole or absent, never half. Reading goes by parameter name, so a run resumes on any number of ranks
and any ZeRO stage.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwenvl_dist.checkpoints import manifest as manifests
from qwenvl_dist.checkpoints.publish import (
    PublishFailed,
    Write,
    describe,
    publish,
    remove_leftovers,
    remove_whole,
)
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from qwenvl_dist.distributed import HostGroup
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.files import fsync
from qwenvl_dist.heartbeat import collective_seconds
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.base_folder import BaseFolder
from qwenvl_dist.model.load import save_processor
from qwenvl_dist.model.lora import trainable_parameters
from qwenvl_dist.training.output_folder import set_aside
from qwenvl_dist.training.restore import RelayedCheckpoint, load_trained_state, require_same_adapter
from qwenvl_dist.training.state import data_state, restore_progress
from qwenvl_dist.training.swapped import fill_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenvl_dist.training.state import TrainState

log = get_logger(__name__)
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "webdataset")


class CheckpointError(CheckFailed):
    """A checkpoint could not be written; earlier ones are untouched."""


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


class _Catcher:
    """Stands for DeepSpeed's checkpoint engine and writes nothing: no disk can fail among its barriers."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = state_dict

    def is_decoupled(self) -> bool:
        return True  # DeepSpeed then leaves it to the engine to say that all is done

    def create(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...


def partitions(engine: Any) -> dict[str, Any]:
    """Return this rank's files of a DeepSpeed checkpoint, by name: references to the live state. Collective.

    What is in swap files is referred to there, so that a checkpoint does not tell where its optimizer was.
    """
    catcher, own, script = _Catcher(), engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine = catcher
    engine._copy_recovery_script = lambda _path: None  # its converters; here it is `qwenvl-dist merge`
    engine.zero_nvme_offload_optimizer = lambda: False  # else it copies its swap files into the folder
    try:
        with _only_trained(engine.module):
            engine.save_checkpoint("nowhere", tag=manifests.PARTITIONS, exclude_frozen_parameters=True)
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = own, script
        del engine.zero_nvme_offload_optimizer
    for content in catcher.files.values():
        if "optimizer_state_dict" in content and engine.zero_optimization_stage() == 3:
            fill_in(engine.optimizer, content["optimizer_state_dict"])
    return catcher.files


def _writes(content: bytes | memoryview) -> Write:
    return lambda file: file.write(content)


class Checkpoints:
    """The checkpoints folder of one run.

    Args:
        state: of the run.
        base: the resolved folder of the base.
        elsewhere: ranks that do not see rank 0's output folder; it writes and reads for them.
    """

    def __init__(self, state: TrainState, base: Path, elsewhere: Sequence[int] = ()) -> None:
        self.state, self._elsewhere = state, list(elsewhere)
        self.run = Path(state.recipe.train.output_dir)
        self.folder = self.run / "checkpoints"
        self.base = {"path": state.recipe.model.base, "fingerprint": BaseFolder(base).fingerprint()}
        self.last_saved: int | None = None
        self._same_files = self._read_same_files() if state.topology.is_main else {}
        self._group = state.host
        self._thread: ThreadPoolExecutor | None = None
        self._in_flight: Future[None] | None = None
        if state.recipe.train.checkpoint_async:
            # Its own group: two threads must not talk over one.
            self._group = HostGroup(collective_seconds(state.recipe.train.timeout_seconds))
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def _read_same_files(self) -> dict[str, Write]:
        """Return what is the same in every checkpoint."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            adapter = getattr(self.state.engine.module, "peft_config", None)
            if adapter is not None:
                adapter["default"].save_pretrained(scratch)
            data = self.state.recipe.data
            save_processor(
                self.state.processor, data.picture_size, folder / "processor", data.max_visual_tokens
            )
            found = {
                str(path.relative_to(folder)): path.read_bytes() for path in manifests.files_below(folder)
            }
        found["latest"] = manifests.PARTITIONS.encode()
        return {name: _writes(content) for name, content in found.items()}

    # --- writing -----------------------------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Write the current step's checkpoint, point `best` at it if it is, rotate. Collective.

        With `train.checkpoint_async` only until all is copied to host memory; `wait` does the rest.
        Raises CheckpointError on all ranks when one of them could not write; earlier checkpoints stay as they are.
        """
        self.wait()
        state, step = self.state, self.state.progress.step
        failure = ""
        if state.topology.is_main:
            try:
                if not self.folder.is_dir():
                    self.folder.mkdir(parents=True)
                    fsync(self.run)
                remove_leftovers(self.folder)
            except OSError as error:
                failure = f"rank 0: {describe(error)}"
        failure = state.host.from_main(failure)
        if failure:
            raise self._error(step, failure)
        files = dict(self._same_files)
        for name, content in partitions(state.engine).items():
            write = partial(torch.save, content)
            if self._thread:
                memory = io.BytesIO()
                write(memory)
                write = _writes(memory.getbuffer())
            files[f"{manifests.PARTITIONS}/{name}"] = write
        is_best = val_loss is not None and val_loss == state.progress.best_val_loss
        arguments = (step, files, self._manifest(val_loss), is_best)
        self.last_saved = step
        if self._thread:
            self._in_flight = self._thread.submit(self._finish, *arguments)
        else:
            self._finish(*arguments)

    @property
    def failed(self) -> bool:
        """Whether this rank knows that what was written in the background could not be; `wait` tells why."""
        return self._in_flight is not None and self._in_flight.done() and bool(self._in_flight.exception())

    def wait(self) -> None:
        """Wait for what is written in the background. Collective in effect; raises as `save` does."""
        if self._in_flight:
            in_flight, self._in_flight = self._in_flight, None
            in_flight.result()

    def _error(self, step: int, reason: object) -> CheckpointError:
        return CheckpointError(
            f"checkpoint of step {step} could not be written: {reason}; "
            "earlier checkpoints are untouched, mend the storage and start again to resume"
        )

    def _finish(self, step: int, files: dict[str, Write], manifest: dict[str, Any], is_best: bool) -> None:
        """Publish, then tidy up. Collective over `_group`, in the thread if there is one."""
        final = manifests.step_folder(self.folder, step)
        try:
            publish(self._group, final, files, manifest, self._elsewhere)
        except PublishFailed as error:
            raise self._error(step, error) from None
        log.info("step %d: checkpoint written to %s", step, final)
        if self.state.topology.is_main:
            try:
                if is_best:
                    self._point_best(final)
                self._rotate()
            except OSError as error:
                log.warning("step %d: older checkpoints could not be tidied up: %s", step, describe(error))

    def _manifest(self, val_loss: float | None) -> dict[str, Any]:
        state, recipe = self.state, self.state.recipe
        return {
            "step": state.progress.step,
            "world_size": state.topology.world_size,
            "zero_stage": state.engine.zero_optimization_stage(),
            "dtype": recipe.model.dtype,
            "versions": {package: version(package) for package in _PACKAGES},
            "base": self.base,
            "lora": recipe.lora.model_dump(mode="json") if recipe.lora else None,
            "data": data_state(
                state.progress, state.identity, state.batches.plan.progress(state.progress.consumed)
            ),
            "progress": {
                "global_batch_size": state.batches.layout.global_batch_size,
                "best_val_loss": state.progress.best_val_loss,
            },
            "val_loss": val_loss,
        }

    def _point_best(self, final: Path) -> None:
        fresh = self.folder / f".{manifests.BEST}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(final.name)
        fresh.replace(self.folder / manifests.BEST)

    def _rotate(self) -> None:
        """Remove the oldest checkpoints beyond the number to keep; never the best or the newest."""
        best = (self.folder / manifests.BEST).resolve()
        for folder in manifests.step_folders(self.folder)[self.state.recipe.train.keep_checkpoints :]:
            if folder.resolve() != best:
                remove_whole(folder, "removed")

    # --- reading -----------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Load the checkpoint that the recipe asks for, if there is one. Collective; tells whether it did."""
        wanted = self.state.recipe.train.resume
        host = self.state.host
        found: tuple[str | None, dict[str, Any], str] = (None, {}, "")
        if self.state.topology.is_main:
            for name in remove_leftovers(self.folder):
                log.info("removed %s, which an earlier start did not finish", self.folder / name)
            if wanted != "never":
                found = self._find(wanted)
        folder, manifest, failure = host.from_main(found)
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
        checkpoint = (
            RelayedCheckpoint(Path(folder), host) if self._elsewhere else ZeroCheckpoint(Path(folder))
        )
        load_trained_state(self.state.engine, checkpoint)
        best = self._drop_other_histories(Path(folder)) if self.state.topology.is_main else None
        self.state.progress.best_val_loss = host.from_main(best)
        self.last_saved = self.state.progress.step
        log.info("resumed from %s: step %d", folder, self.state.progress.step)
        return True

    def _drop_other_histories(self, resumed: Path) -> float | None:
        """Move checkpoints to `discarded/` that do not lead to the resumed one; return the best validation loss left.

        They are damaged or undone ones of later steps, and all when another run's is resumed: rotation would count
        them among the newest, and the next resume take one of a history that is no more. `best` points to the best of
        those that stay. Rank 0 only.
        """
        own = resumed.resolve().parent == self.folder.resolve()
        losses: list[tuple[float, str]] = []
        for folder in manifests.step_folders(self.folder):
            if not own or int(folder.name.removeprefix("step-")) > self.state.progress.step:
                target = set_aside(self.run, folder)
                log.warning("resume: moved %s, which %s does not follow, to %s", folder.name, resumed, target)
                continue
            with contextlib.suppress(manifests.InvalidCheckpoint):
                loss = manifests.read_manifest(folder)["val_loss"]
                if loss is not None:
                    losses.append((loss, folder.name))
        if not losses:
            (self.folder / manifests.BEST).unlink(missing_ok=True)
            return None
        loss, name = min(losses)
        self._point_best(self.folder / name)
        return loss

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
            return wanted, manifests.verify_step(Path(wanted)), ""
        except manifests.InvalidCheckpoint as error:
            return None, {}, f"train.resume = {wanted}: {error}; name a whole step folder, or use auto"
