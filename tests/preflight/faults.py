"""Run on ranks: checks of the step, the checkpoint and the links, with the fault that each looks for."""

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qwenvl_dist.config import load_recipe
from qwenvl_dist.distributed import HostGroup, Topology, start
from qwenvl_dist.preflight import step
from qwenvl_dist.preflight.checks import Context, Finding
from tests.preflight.fakes import find


def joined(recipe: str) -> Context:
    loaded = load_recipe(recipe)
    accelerator = start(loaded)
    return Context(loaded, Topology.from_environment(), HostGroup(60), accelerator)


def run_step_faults(recipe: str, out: str) -> None:
    """One rank: make every check of the step and the checkpoint, first healthy, then broken; write the findings."""
    import torch

    from qwenvl_dist.checkpoints.publish import PublishFailed
    from qwenvl_dist.training import checkpoint

    context = joined(recipe)
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, finding: Finding) -> None:
        found[name] = finding.to_json()

    healthy = (
        "model_loads", "worst_batch", "rank_without_picture", "adapter_gradients", "loss_falls", "loader_rate",
        "checkpoint",
    )  # fmt: skip
    for name in healthy:
        note(name, find(name, context))
    note(
        "left behind",
        Finding("", "", find("text_only", context).status, str(list(context.run.iterdir())), "", 0),
    )
    state: Any = context.state

    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with patch("qwenvl_dist.training.step.train_step", out_of_memory):
        note("out of memory", find("worst_batch", context))

    from torch.utils.checkpoint import checkpoint as recompute

    # The lowest layer's input has no gradient: a reentrant one then gives none to its weights.
    lowest = state.engine.module.get_base_model().model.language_model.layers[0]
    kept = lowest._gradient_checkpointing_func
    lowest.gradient_checkpointing, lowest._gradient_checkpointing_func = (
        True,
        partial(recompute, use_reentrant=True),
    )
    note("reentrant", find("adapter_gradients", context))
    lowest.gradient_checkpointing, lowest._gradient_checkpointing_func = False, kept

    real_step = step._step
    with patch.object(step, "_step", lambda context, batches, rate: real_step(context, batches, -rate)):
        find("adapter_gradients", context)
        note("uphill", find("loss_falls", context))

    context.worst_seconds = 1e-6
    note("slow loader", find("loader_rate", context))

    def full(*_: Any) -> None:
        raise PublishFailed("rank 0: No space left on device")

    with patch.object(checkpoint, "publish", full):
        note("full disk", find("checkpoint", context))
    with patch.object(checkpoint, "load_trained_state", lambda *_: None):
        note("not read back", find("checkpoint", context))
    find("adapter_gradients", context)  # masters are what they were before
    with patch("qwenvl_dist.merge.apply_lora.merged_rows", lambda plan, rows, begin, end: rows):
        note("empty adapter", find("checkpoint", context))
    Path(out).write_text(json.dumps(found))


def run_check(recipe: str, name: str, out: str) -> None:
    """Every rank: join, make one check; rank 0 writes the finding."""
    context = joined(recipe.replace("{rank}", os.environ["RANK"]))
    finding = find(name, context)
    if context.topology.is_main:
        Path(out).write_text(json.dumps(finding.to_json()))


@contextlib.contextmanager
def _changed(fault: str) -> Iterator[None]:
    """Break something on rank 1, or on all ranks."""
    from qwenvl_dist.preflight import data, environment

    if fault == "no dummy picture":
        original: Callable[..., Any] = step._text_batch

        def bare(state: Any) -> Any:
            from dataclasses import replace

            import torch

            batch = original(state)
            return replace(
                batch, grids=(), pixels=batch.pixels[:0], image_grid_thw=batch.image_grid_thw[:0],
                image_positions=torch.empty(0, dtype=torch.int64),
            )  # fmt: skip

        with patch.object(step, "_text_batch", bare):
            yield
    elif fault == "silent":
        if os.environ["RANK"] == "1":
            with patch.object(data, "_manifests", lambda _: os.kill(os.getpid(), signal.SIGSTOP)):
                yield
        else:
            yield
    elif fault == "other version" and os.environ["RANK"] == "1":
        real = environment.version
        with patch.object(environment, "version", lambda name: "9.9.9" if name == "peft" else real(name)):
            yield
    elif fault == "late" and os.environ["RANK"] == "1":
        real_time = time.time
        with patch.object(environment, "time", lambda: real_time() + 1000):
            yield
    else:
        yield


def run_preflight(words: list[str], fault: str, out: str) -> None:
    """Run the command as a launcher would, with a fault; rank 0 writes code and report."""
    from qwenvl_dist.__main__ import main

    printed = io.StringIO()
    with _changed(fault), contextlib.redirect_stdout(printed):
        code = main(["preflight", *words, "--json"])
    if os.environ["RANK"] == "0":
        report = json.loads(printed.getvalue().splitlines()[-1])
        Path(out).write_text(json.dumps({"code": code, **report}))
