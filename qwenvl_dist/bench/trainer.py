"""The usual way: a transformers Trainer with gradient checkpointing and full logits, in a process of its own.

It takes turns with whoever measures: it waits for a number of steps on its pipe, makes them, sends their seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe
    from qwenvl_dist.data.batch import CaptionBatch
    from qwenvl_dist.model.pixels import PixelSettings

# What launchers, accelerate and DeepSpeed leave in the environment.
_LAUNCH = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "DS_", "FSDP_")


class TrainerProcess:
    """A Trainer on prepared batches, one a step; a context manager."""

    def __init__(self, base: Path, recipe: Recipe, inputs: Path, steps: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(theirs, str(base), recipe.to_dict(), str(inputs), steps, threads), daemon=True
        )

    def __enter__(self) -> Self:
        """Start it; its model loads while ours does."""
        # It must not take itself for one of our ranks.
        held = {name: value for name, value in os.environ.items() if name.startswith(_LAUNCH)}
        for name in held:
            del os.environ[name]
        try:
            self._process.start()
        finally:
            os.environ.update(held)
        return self

    def run(self, steps: int) -> tuple[list[float], list[float]]:
        """Let it make `steps` steps; return their seconds and, as far as logged, their losses."""
        self._pipe.send(steps)
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError("the Trainer's process ended; its error is above") from error

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.terminate()
        self._process.join()


def trainer_inputs(batch: CaptionBatch, settings: PixelSettings, image_token: int) -> dict[str, Any]:
    """Return the batch as transformers' forward takes it, padding masked."""
    import torch

    from qwenvl_dist.model.pixels import pixel_values

    # Padding has position 0 on all axes, as only the first token has beside it.
    mask = (batch.position_ids.sum(0) > 0).long()
    mask[:, 0] = 1
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "attention_mask": mask,
        "mm_token_type_ids": (batch.input_ids == image_token).to(torch.int32),
        "pixel_values": pixel_values(batch.pixels, batch.grids, settings),
        "image_grid_thw": batch.image_grid_thw,
    }


def _run(pipe: Connection, base: str, recipe: dict[str, Any], inputs: str, steps: int, threads: int) -> None:
    """Be the process."""
    import tempfile

    import peft
    import torch
    import transformers

    from qwenvl_dist.config import LoraConfig
    from qwenvl_dist.model.lora import peft_config

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    batches: Sequence[dict[str, Any]] = torch.load(inputs)
    lora, optim = recipe["lora"], recipe["optim"]
    model: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        base, dtype=getattr(torch, recipe["model"]["dtype"]), attn_implementation="sdpa"
    )
    model.enable_input_require_grads()
    model = peft.get_peft_model(
        model,
        peft_config(LoraConfig.model_validate(lora), task_type="CAUSAL_LM"),
    )
    callback = _turns(pipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,  # an item is a whole batch
                max_steps=steps,
                learning_rate=optim["learning_rate"],
                lr_scheduler_type="constant",
                gradient_checkpointing=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                dataloader_num_workers=0,
                disable_tqdm=True,
            ),
            train_dataset=list(batches),  # type: ignore[arg-type]  (anything with a length and items)
            data_collator=lambda items: items[0],
            callbacks=[callback],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # stdout belongs to the report
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(  # in the given order
            list(batches),  # type: ignore[arg-type]
            batch_size=1,
            collate_fn=lambda items: items[0],
        )
        trainer.train()


def _turns(pipe: Connection) -> Any:
    """Return a callback that makes steps when the pipe asks for them."""
    import torch
    import transformers

    class Turns(transformers.TrainerCallback):
        left = 0
        started = 0.0

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.left:
                self.left = pipe.recv()
                self.seconds, self.losses = [], []
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.started)

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            if not logs or "loss" not in logs:
                return
            self.losses.append(logs["loss"])
            self.left -= 1
            if not self.left:
                pipe.send((self.seconds, self.losses))

    return Turns()
