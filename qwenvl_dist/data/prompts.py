"""Prompts for generation: samples of the plan, or single pictures, as left-padded batches.

Stages of the webdataset pipeline, beside the one in `stream`:
1. PlannedSource    the plan's next samples, as verified bytes
2. PromptEncoder    JPEG decode, resize, chat template up to the last answer; a bad sample becomes a dummy
3. batched          examples -> PromptBatch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset import filters, handlers
from webdataset.pipeline import DataPipeline

from qwenvl_dist.data.batch import BadSampleRecord
from qwenvl_dist.data.boxes import NamedBox
from qwenvl_dist.data.chat import Grid, Int64
from qwenvl_dist.data.formats import crowds_of, is_learned, parse_sample_json, texts_in
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import UnreadableImage
from qwenvl_dist.data.source import PlannedSample, PlannedSource, Shards
from qwenvl_dist.data.stream import SampleEncoder


@dataclass(frozen=True)
class Asked:
    """Which sample a prompt comes from, and the answer that its author gave."""

    key: str
    image_id: int | str
    reference: str
    prompt: str = ""  # the text of the last question
    crowds: tuple[NamedBox, ...] = ()  # regions in which boxes are neither right nor wrong


@dataclass(frozen=True)
class Prompt:
    """A conversation that the model is to go on with.

    A dummy has no `asked`; a bad sample is a dummy with a record.
    """

    asked: Asked | None
    input_ids: Int64  # (seq,)
    grids: tuple[Grid, ...]
    pixels: NDArray[np.uint8]  # (bytes,): the pictures one after another, each (3, height, width)
    bad: BadSampleRecord | None = None


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one forward pass on one rank, padded on the left, where generation goes on at the right."""

    input_ids: Tensor  # (batch, seq) int64
    attention_mask: Tensor  # (batch, seq) int64, 0 = padding
    mm_token_type_ids: Tensor  # (batch, seq) int64, 1 = visual token; padded on the same side
    pixels: Tensor  # (bytes,) uint8: all pictures one after another, each (3, height, width)
    image_grid_thw: Tensor  # (images, 3) int64, in patches
    grids: tuple[Grid, ...]  # image_grid_thw on the host
    asked: tuple[Asked | None, ...]  # one a row; None: a dummy
    bad: tuple[BadSampleRecord, ...]

    def to(self, device: torch.device) -> PromptBatch:
        """Return the batch on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def split_last_answer(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the messages before the assistant's last turn that is learned, and the text of that turn."""
    last = max((n for n, message in enumerate(messages) if is_learned(message)), default=None)
    if last is None:
        raise ValueError("no message of the assistant to compare with")
    return messages[:last], text_of(messages[last : last + 1])


def text_of(messages: Sequence[dict[str, Any]]) -> str:
    """Return the texts of messages, one after another, without their pictures."""
    return "".join(texts_in(messages))


class PromptEncoder:
    """Bytes of a sample -> Prompt. Picklable; runs in loader workers."""

    def __init__(self, encoder: SampleEncoder) -> None:
        self.encoder = encoder
        self.pad_token, self.image_token = encoder.chat.pad_token, encoder.chat.image_token
        dummy = encoder.dummy
        self.dummy = Prompt(None, dummy.chat.input_ids, dummy.grids, dummy.pixels)

    def prompt(self, messages: list[dict[str, Any]], pictures: Sequence[bytes], asked: Asked) -> Prompt:
        """Encode a conversation. Raises UnreadableImage, or ValueError when pictures and text disagree."""
        sized, _ = self.encoder.pictures(pictures)
        grids = tuple(grid for _, grid in sized)
        pixels = np.concatenate([p for p, _ in sized]) if sized else np.zeros(0, np.uint8)
        return Prompt(asked, self.encoder.chat.encode_prompt(messages, grids), grids, pixels)

    def encode(self, raw: RawSample) -> Prompt:
        """Encode one sample up to its last answer that is learned. Raises UnreadableImage; ValueError for damage."""
        record = parse_sample_json(raw.json, len(raw.images))
        messages, reference = split_last_answer(record["messages"])
        questions = [message for message in messages if message["role"] == "user"]
        image_id = record.get("image_id")
        asked = Asked(
            raw.key,
            raw.key if image_id is None else image_id,
            reference,
            text_of(questions[-1:]),
            crowds_of(record),
        )
        # Turns that are left out behind the answer may have pictures of their own.
        shown = sum(part["type"] == "image" for message in messages for part in message["content"])
        return self.prompt(messages, raw.images[:shown], asked)

    def __call__(self, sample: PlannedSample) -> Prompt:
        """Encode what the plan gave; anything unusable becomes a dummy that carries its record."""
        if sample.raw is None:
            return replace(self.dummy, bad=sample.bad)
        try:
            return self.encode(sample.raw)
        except (UnreadableImage, ValueError) as error:
            return replace(self.dummy, bad=BadSampleRecord(sample.shard, sample.raw.key, str(error)))

    def collate(self, prompts: Sequence[Prompt]) -> PromptBatch:
        """Pad prompts on the left.

        Dummies are left out, but never the last picture: the vision tower runs in every batch on every rank,
        which ZeRO-3's collective gathers need.
        """
        rows = [prompt for prompt in prompts if prompt.asked is not None]
        if not any(row.grids for row in rows):
            rows.append(self.dummy)
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        input_ids = np.full(shape, self.pad_token, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            input_ids[number, shape[1] - len(row.input_ids) :] = row.input_ids
            attention_mask[number, shape[1] - len(row.input_ids) :] = 1
        grids = tuple(grid for row in rows for grid in row.grids)
        return PromptBatch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            mm_token_type_ids=torch.from_numpy((input_ids == self.image_token).astype(np.int64)),
            pixels=torch.from_numpy(np.concatenate([row.pixels for row in rows])),
            image_grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
            grids=grids,
            asked=tuple(row.asked for row in rows),
            bad=tuple(prompt.bad for prompt in prompts if prompt.bad is not None),
        )


class PromptStream:
    """The prompts of one rank: each sample of the plan once over all ranks, as many batches on each."""

    def __init__(
        self,
        shards: Shards,
        plan: RunPlan,
        layout: StepLayout,
        encoder: PromptEncoder,
        *,
        rank: int,
        workers: int,
    ) -> None:
        self.shards, self.plan, self.layout, self.encoder = shards, plan, layout, encoder
        self.rank, self.workers = rank, workers

    def iterate(self) -> Iterator[PromptBatch]:
        """Yield the batches in the order of the plan."""
        steps = self.layout.steps(self.plan.total_samples)
        pipeline: Any = DataPipeline(
            PlannedSource(self.shards, self.plan, self.layout, self.rank, start=0, steps=steps),
            filters.map(self.encoder, handler=handlers.reraise_exception),
            filters.batched(self.layout.micro_batch_size, collation_fn=self.encoder.collate, partial=False),
        )
        yield from DataLoader(pipeline, batch_size=None, num_workers=self.workers)
