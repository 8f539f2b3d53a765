"""One optimizer step, and one validation pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenvl_dist.data.plan import hash_key
from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.lora import trainable_parameters

if TYPE_CHECKING:
    from qwenvl_dist.data.batch import CaptionBatch
    from qwenvl_dist.training.state import TrainState

log = get_logger(__name__)
_DROPOUT_STREAM = 3


@dataclass(frozen=True)
class StepResult:
    """What one step gave on this rank. Tensors stay on the device until somebody logs."""

    losses: Tensor  # (micro batches,) float32: this rank's summed token losses
    keys: tuple[tuple[str, ...], ...]  # the samples of each micro-batch
    target_tokens: int  # over all ranks
    samples: int  # over all ranks, dummies left out

    def non_finite_keys(self) -> list[str]:
        """Name the samples of micro-batches whose loss is NaN or infinite. Waits for the device."""
        broken = (~torch.isfinite(self.losses)).tolist()
        return [key for keys, is_broken in zip(self.keys, broken, strict=True) if is_broken for key in keys]

    @property
    def is_finite(self) -> bool:
        """Whether every loss of this rank is a number. Waits for the device."""
        return bool(torch.isfinite(self.losses).all())


def train_step(
    state: TrainState, micro_batches: Sequence[CaptionBatch], rate: float, target_tokens: int, samples: int
) -> StepResult:
    """Accumulate over the micro-batches and update once. Collective.

    The objective is the sum of token losses over the global batch divided by its `target_tokens`, so that ranks,
    accumulation and padding do not change it. DeepSpeed averages over ranks and accumulation; the factor undoes that.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    layout = state.batches.layout
    scale = layout.world_size * layout.grad_accum_steps / max(1, target_tokens)
    losses = []
    for index, batch in enumerate(micro_batches):
        # Dropout is a function of (seed, step, micro-batch of the step): a resume needs no random state, and the same
        # global batch draws the same masks on any number of ranks.
        micro_batch = layout.micro_batch(state.topology.rank, index)
        seed = hash_key(state.recipe.train.seed, state.progress.step, micro_batch, _DROPOUT_STREAM)
        torch.manual_seed(seed & (2**63 - 1))
        with state.accelerator.accumulate(state.engine):
            with state.pace.forward():
                loss = state.engine(batch=batch.to(state.accelerator.device))
            state.accelerator.backward(loss * scale)
        losses.append(loss.detach())
    assert state.accelerator.sync_gradients, "accumulation and optimizer step fell out of step"
    return StepResult(torch.stack(losses), tuple(b.keys for b in micro_batches), target_tokens, samples)


@torch.no_grad()
def validation_loss(state: TrainState) -> float:
    """Return the mean token loss over the validation set, every sample once. Collective.

    Bad samples are left out and named. Raises CheckFailed when nothing is left and on a loss that is not finite: either
    would pass for the best there ever was.
    """
    assert state.validation is not None
    state.engine.eval()
    total = torch.zeros((), dtype=torch.float64, device=state.accelerator.device)
    tokens, bad = 0, []
    for (batch,) in state.validation.iterate():
        bad += batch.bad
        total += state.engine(batch=batch.to(state.accelerator.device))
        tokens += batch.target_tokens
    state.engine.train()
    parts = state.host.gather((total.item(), tokens, bad))
    for record in [record for _, _, part in parts for record in part] if state.topology.is_main else ():
        log.warning("validation: bad sample %s in %s left out: %s", record.key, record.shard, record.reason)
    all_tokens = sum(part for _, part, _ in parts)
    if not all_tokens:
        raise CheckFailed(
            f"data.validation = {state.recipe.data.validation}: no sample of it has a token to learn or can be read; "
            "qwenvl-dist shards verify names what is damaged"
        )
    loss = sum(part for part, _, _ in parts) / all_tokens
    if not math.isfinite(loss):
        raise CheckFailed(
            f"step {state.progress.step}: the validation loss is not finite; the last checkpoint is intact, "
            "lower optim.learning_rate or look at the validation samples"
        )
    return loss


class GradientCensus:
    """Watches during the first steps whether every adapter tensor is reached by a gradient.

    lora_A has none in step 1, since lora_B starts at zero; so B is due in step 1 and A in step 2. Tensor hooks see the
    gradient before ZeRO partitions it, under every stage.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._seen: dict[str, list[Tensor]] = {}
        self._handles = [
            parameter.register_hook(self._hook(name))
            for name, parameter in trainable_parameters(model).items()
            if "lora_" in name
        ]
        self._names = [name for name in trainable_parameters(model) if "lora_" in name]

    def _hook(self, name: str):
        def record(gradient: Tensor) -> None:
            finite = torch.isfinite(gradient).all()
            self._seen.setdefault(name, []).append(torch.stack([finite, finite & (gradient != 0).any()]))

        return record

    def starved(self, state: TrainState, step: int) -> list[str]:
        """Return the adapter tensors due in `step` that got no finite, non-zero gradient on any rank. Collective."""
        due = [name for name in self._names if step > 1 or "lora_B" in name]
        reached = []
        for name in due:
            seen = self._seen.get(name)
            flags = torch.stack(seen).tolist() if seen else []
            reached.append(bool(flags) and all(f for f, _ in flags) and any(n for _, n in flags))
        self._seen.clear()
        counts = state.host.sum(*(int(r) for r in reached)) if due else ()
        return [name for name, count in zip(due, counts, strict=True) if not count]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
