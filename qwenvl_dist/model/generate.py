"""Answers to prompts by greedy generation: of one batch, and of all prompts of a data set over any number of ranks.

Greedy whatever the model's generation_config.json says: no sampling and no repetition penalty, so that a caption
depends neither on chance nor on the padding of its batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from qwenvl_dist.data.boxes import MARKS
from qwenvl_dist.model.pixels import pixel_values

if TYPE_CHECKING:
    from qwenvl_dist.data.batch import BadSampleRecord
    from qwenvl_dist.data.prompts import Asked, PromptBatch, PromptStream
    from qwenvl_dist.distributed import HostGroup, OneRank
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss


@contextlib.contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own settings, from which transformers would fill in what `config` leaves open."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()  # no inference mode: what a training model keeps of it must not be barred from autograd
def greedy_tokens(
    model: Qwen2VLForCaptionLoss,
    batch: PromptBatch,
    max_new_tokens: int,
    tokenizer: Any,
    in_step: bool = False,
) -> list[list[int]]:
    """Return the most likely next tokens of each row, up to the end of the turn.

    With `in_step` it is collective: no rank stops before all have, since ZeRO-3 gathers each weight from all of them.
    """
    assert model.pixel_settings is not None, "set pixel_settings after loading"
    own_ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    ends.update([own_ends] if isinstance(own_ends, int) else own_ends or [])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
    )
    generate: Any = model.generate  # type: ignore[attr-defined] (its protocol does not fit its own models)
    with _generation_config(model, config):
        output: Any = generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.mm_token_type_ids,
            pixel_values=pixel_values(batch.pixels, batch.grids, model.pixel_settings),
            image_grid_thw=batch.image_grid_thw,
            generation_config=config,
            synced_gpus=in_step,  # transformers' own guess is that of a ZeRO-3 configuration
        )
    rows = output[:, batch.input_ids.shape[1] :].tolist()
    return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]


def answer(
    model: Qwen2VLForCaptionLoss,
    batch: PromptBatch,
    max_new_tokens: int,
    tokenizer: Any,
    in_step: bool = False,
) -> list[str]:
    """Return the answer to each row of the batch, dummies too; `in_step` as in `greedy_tokens`."""
    rows = greedy_tokens(model, batch, max_new_tokens, tokenizer, in_step)
    return [_text(tokenizer, ids, asked) for ids, asked in zip(rows, batch.asked, strict=True)]


def _text(tokenizer: Any, ids: list[int], asked: Asked | None) -> str:
    """Return what tokens say, without special ones; where boxes were asked for, with the marks of boxes and names."""
    if asked is None or not any(mark in asked.prompt + asked.reference for mark in MARKS):
        return tokenizer.decode(ids, skip_special_tokens=True).strip()
    hidden = set(tokenizer.all_special_ids) - set(tokenizer.convert_tokens_to_ids(list(MARKS)))
    return tokenizer.decode([each for each in ids if each not in hidden], skip_special_tokens=False).strip()


@dataclass(frozen=True)
class Answers:
    """What was said to all prompts of a stream, over all ranks."""

    said: list[tuple[Asked, str]]  # in the order of the plan
    bad: list[BadSampleRecord]
    seconds: float  # of the slowest rank, reading and decoding of pictures included

    @property
    def per_second(self) -> float:
        """Prompts answered in a second, by all ranks together."""
        return len(self.said) / self.seconds if self.seconds else 0.0


def answer_all(
    stream: PromptStream,
    answer_batch: Callable[[PromptBatch], list[str]],
    host: HostGroup | OneRank,
    *,
    dummies_too: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> Answers:
    """Answer this rank's prompts and return those of all ranks, each once. Collective.

    A rank whose last batches hold no sample leaves them out, or with `dummies_too` answers their dummies, so that all
    ranks generate equally often. `advance` is told how many prompts, bad ones included, a batch had.
    """
    began = time.monotonic()
    batches: list[list[tuple[Asked, str]]] = []
    bad: list[BadSampleRecord] = []
    for batch in stream.iterate():
        bad += batch.bad
        wanted = dummies_too or any(batch.asked)
        texts = answer_batch(batch) if wanted else [""] * len(batch.asked)
        said = [(asked, text) for asked, text in zip(batch.asked, texts, strict=True) if asked is not None]
        batches.append(said)
        advance(len(said) + len(batch.bad))
    parts = host.gather((batches, bad, time.monotonic() - began))
    # Batch s of rank r is micro-batch r of step s of the plan.
    steps = zip(*(batches for batches, _, _ in parts), strict=True)
    return Answers(
        [each for step in steps for batch in step for each in batch],
        [record for _, bad, _ in parts for record in bad],
        max(seconds for _, _, seconds in parts),
    )
