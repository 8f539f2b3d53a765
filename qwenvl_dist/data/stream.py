"""Plan + source + preprocessing -> batches, resumable at any step.

Stages of the webdataset pipeline that each loader worker runs:
1. PlannedSource   the plan's next samples, as verified bytes
2. micro_batches   the samples of one at a time
   CaptionDraw     one of a sample's captions, where the recipe wants that
3. SampleEncoder   decode, resize, chat template, labels; a bad sample becomes a dummy in its slot
   _Collate        examples -> CaptionBatch
4. BatchSlots      the batch -> memory shared with the training process
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset import filters, handlers
from webdataset.pipeline import DataPipeline

from qwenvl_dist.data.batch import Adjustment, BadSampleRecord, CaptionBatch, Example, collate
from qwenvl_dist.data.chat import IGNORE, ChatEncoder, EncodedChat, Grid, TooLong, image_tokens
from qwenvl_dist.data.draw import CaptionDraw
from qwenvl_dist.data.features import read_features
from qwenvl_dist.data.formats import parse_sample_json
from qwenvl_dist.data.images import decode, resize
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.plan import Plan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule, UnreadableImage
from qwenvl_dist.data.slots import BatchSlots
from qwenvl_dist.data.source import PlannedSample, PlannedSource, SampleLengths, Shards

if TYPE_CHECKING:
    from qwenvl_dist.config import OverLength

Out = TypeVar("Out")


@dataclass(frozen=True)
class Seen:
    """A sample whose pictures are done and whose text is not."""

    messages: list[dict[str, Any]]
    grids: tuple[Grid, ...]
    pixels: NDArray[np.uint8]
    features: Tensor | None = None
    is_shrunk: bool = False


class TooLarge(Exception):  # noqa: N818 (names the sample's state; counted, not fatal)
    """A sample that the recipe wants left out for its length."""


class SampleEncoder:
    """Bytes of a sample -> Example. Picklable; runs in loader workers."""

    def __init__(
        self,
        processor: Any,
        size_rule: ImageSizeRule,
        max_length: int,
        exact_resize: bool = True,
        caption_mark: str | None = None,
        features_width: int | None = None,
        over_length: OverLength = "cut",
    ) -> None:
        self.features_width = (
            features_width  # hidden size of features in the shards; None: they hold pictures
        )
        self.exact_resize = exact_resize
        self.over_length = over_length  # what becomes of a sample above max_length
        self.chat = ChatEncoder(processor, max_length, may_cut=over_length == "cut")
        self.caption_mark = caption_mark  # separates captions that share a prefix; None joins them
        self.size_rule = size_rule
        self.patch_size = int(processor.image_processor.patch_size)
        self.dummy = self._make_dummy()

    @property
    def max_bytes(self) -> int:
        """How much of a batch one sample with one picture takes at most: its pixels or features, 7 int64 a token."""
        area = self.size_rule.max_pixels if self.size_rule.side is None else self.size_rule.side**2
        width = self.features_width
        picture = 3 * area if width is None else 2 * width * area // self.size_rule.factor**2
        return picture + 8 * 8 * self.chat.max_length

    def _make_dummy(self) -> Example:
        side, grids, features = self.size_rule.factor, (), None
        if self.features_width is None:
            grids = ((1, side // self.patch_size, side // self.patch_size),)
        else:
            features = torch.empty(0, self.features_width, dtype=torch.bfloat16)
        messages = [{"role": "user", "content": [{"type": "image"} for _ in grids]}]
        chat = self.chat.encode(messages, grids)
        chat = replace(chat, labels=np.full_like(chat.labels, IGNORE))
        return Example(None, chat, grids, np.zeros(3 * side * side * len(grids), np.uint8), features=features)

    def picture(self, data: bytes) -> tuple[np.ndarray, Grid]:
        """Return ((3 * height * width,) uint8, grid) of one picture at the model's size. Raises UnreadableImage."""
        pixels = decode(data)
        return self._resized(pixels, *self.size_rule.target(pixels.shape[1], pixels.shape[0]))

    def pictures(
        self, images: Sequence[bytes], limit: int | None = None
    ) -> tuple[list[tuple[np.ndarray, Grid]], bool]:
        """Return `picture` of all pictures of a sample, and whether any was shrunk so that they keep their bounds.

        The bounds are the rule's and `limit`, in visual tokens. Raises UnreadableImage.
        """
        decoded = [decode(data) for data in images]
        targets, shrunk = self.size_rule.targets([(p.shape[1], p.shape[0]) for p in decoded], limit)
        return [self._resized(p, *target) for p, target in zip(decoded, targets, strict=True)], shrunk

    def _resized(self, pixels: NDArray[np.uint8], height: int, width: int) -> tuple[np.ndarray, Grid]:
        grid = (1, height // self.patch_size, width // self.patch_size)
        return resize(pixels, height, width, self.exact_resize).reshape(-1).numpy(), grid

    def _see(self, raw: RawSample, limit: int | None = None) -> Seen:
        """Make the pictures ready, of at most `limit` visual tokens."""
        if self.features_width is not None:
            made = read_features(raw.members)
            messages = _messages(raw, len(made.grids))
            if not made.grids:
                return Seen(messages, (), self.dummy.pixels, self.dummy.features)
            made.check_shape(self.features_width, self.chat.merge_size)
            return Seen(messages, made.grids, self.dummy.pixels, made.values)
        messages = _messages(raw, len(raw.images))
        made, shrunk = self.pictures(raw.images, limit)
        pixels = np.concatenate([p for p, _ in made]) if made else np.zeros(0, np.uint8)
        return Seen(messages, tuple(grid for _, grid in made), pixels, is_shrunk=shrunk)

    def _read(self, raw: RawSample, seen: Seen) -> Example:
        try:
            chat = self._encode_chat(seen)
        except TooLong as error:
            if self.over_length == "cut":
                raise
            if self.over_length == "drop":
                raise TooLarge(str(error)) from error
            visual = sum(image_tokens(grid, self.chat.merge_size) for grid in seen.grids)
            if visual - error.excess < max(1, len(seen.grids)):
                raise  # its text alone is too long, which no picture makes up for
            return self._read(raw, self._see(raw, visual - error.excess))
        adjusted = [Adjustment.SHRUNK] * seen.is_shrunk + [Adjustment.CUT] * (chat.cut > 0)
        return Example(
            raw.key, chat, seen.grids, seen.pixels, features=seen.features, adjusted=tuple(adjusted)
        )

    def _encode_chat(self, seen: Seen) -> EncodedChat:
        if self.caption_mark is None:
            return self.chat.encode(seen.messages, seen.grids)
        return self.chat.encode_each(seen.messages, seen.grids, self.caption_mark)

    def encode(self, raw: RawSample) -> Example:
        """Encode one sample. Raises UnreadableImage, TooLong, TooLarge, or ValueError for a damaged record."""
        return self._read(raw, self._see(raw))

    def __call__(self, samples: Sequence[PlannedSample]) -> list[Example]:
        """Encode what the plan gave; anything unusable becomes a dummy that carries its record.

        All pictures first, then all texts: a picture drives the tokenizer out of the processor's caches, after which a
        text costs three times as much.
        """
        seen = [self._or_bad(sample, self._see, sample.slot.max_visual_tokens) for sample in samples]
        examples = [
            got if isinstance(got, Example) else self._or_bad(sample, self._read, got)
            for sample, got in zip(samples, seen, strict=True)
        ]
        return [
            replace(e, position=sample.slot.position) for e, sample in zip(examples, samples, strict=True)
        ]

    def _or_bad(self, sample: PlannedSample, work: Callable[..., Out], *more: Any) -> Out | Example:
        if sample.raw is None:
            return replace(self.dummy, bad=sample.bad)
        try:
            return work(sample.raw, *more)
        except TooLarge:
            return replace(self.dummy, adjusted=(Adjustment.DROPPED,))
        except (UnreadableImage, TooLong, ValueError) as error:
            return replace(self.dummy, bad=BadSampleRecord(sample.shard, sample.raw.key, str(error)))


def _messages(raw: RawSample, num_images: int) -> list[dict[str, Any]]:
    if "json" not in raw.members:
        raise ValueError("json: missing member")
    return parse_sample_json(raw.json, num_images)["messages"]


def _micro_batches(samples: Iterable[PlannedSample]) -> Iterator[list[PlannedSample]]:
    """Yield the samples of one micro-batch at a time."""
    for _, group in itertools.groupby(samples, lambda sample: sample.slot.micro_batch):
        yield list(group)


class _Collate:
    """A picklable `collate` with its constants bound."""

    def __init__(self, encoder: SampleEncoder) -> None:
        self.dummy, self.pad, self.image = encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token

    def __call__(self, examples: list[Example]) -> CaptionBatch:
        return collate(examples, self.dummy, self.pad, self.image)


_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def _live_and_die_with_the_rank(_worker: int) -> None:
    """End this loader worker when its own rank says so or is gone, and at no other time.

    A launcher or scheduler that stops a job signals whole process groups; the rank still finishes its step and writes a
    checkpoint, and a worker that died under it would make that an error: SIGTERM counts only when the rank sends it. A
    killed rank says nothing, and a worker that outlived it would keep its connections open, so that other ranks wait:
    the kernel ends the worker then (prctl(2)).
    """
    rank = multiprocessing.parent_process()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # another system: torch's own look every few seconds remains
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if rank is not None and os.getppid() != rank.pid:  # it ended before
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class CaptionStream:
    """The batches of one rank, from any position on.

    `position` counts samples of the whole run over all ranks; it is the only state, and it is advanced by whoever has
    finished an optimizer step, not by what the workers have prefetched.
    """

    def __init__(
        self,
        shards: Shards,
        plan: Plan,
        layout: StepLayout,
        encoder: SampleEncoder,
        *,
        rank: int,
        workers: int,
        timeout_seconds: float = 0,
        length_grouping: bool = False,
        visual_token_budget: int | None = None,
        drawn_caption_mark: str | None = None,
    ) -> None:
        self.shards, self.plan, self.layout, self.encoder = shards, plan, layout, encoder
        self.rank, self.workers, self.timeout_seconds = rank, workers, timeout_seconds
        self.visual_token_budget = (
            visual_token_budget  # of a micro-batch, which then holds any number of samples
        )
        # What separates captions of which each epoch takes one; None takes the text as it is.
        self.draw = None if drawn_caption_mark is None else CaptionDraw(plan, drawn_caption_mark)
        self.lengths = None
        if length_grouping:
            rule = encoder.size_rule
            self.lengths = SampleLengths(shards, rule.visual_tokens, rule.max_visual_tokens)

    def steps_from(self, position: int) -> int:
        """Return how many optimizer steps are left when `position` samples have been consumed."""
        return self.layout.steps(self.plan.total_samples - position)

    def iterate(self, position: int = 0) -> Iterator[list[CaptionBatch]]:
        """Yield the micro-batches of each optimizer step, from `position` to the end of the plan."""
        source = PlannedSource(
            self.shards,
            self.plan,
            self.layout,
            self.rank,
            start=position,
            steps=self.steps_from(position),
            lengths=self.lengths,
            budget=self.visual_token_budget,
        )
        stages: list[Any] = [
            source,
            _micro_batches,
            *([] if self.draw is None else [filters.map(self.draw, handler=handlers.reraise_exception)]),
            filters.map(self.encoder, handler=handlers.reraise_exception),
            filters.map(_Collate(self.encoder), handler=handlers.reraise_exception),
        ]
        ahead = 2 * self.layout.grad_accum_steps  # micro-batches that each worker keeps ready
        slots = None
        if self.workers and BatchSlots.usable():
            slots = BatchSlots(self.workers, ahead, self.layout.micro_batch_size * self.encoder.max_bytes)
            stages.append(filters.map(slots.put, handler=handlers.reraise_exception))
        pipeline: Any = DataPipeline(*stages)
        pin = torch.cuda.is_available()
        loader = DataLoader(
            pipeline,  # type: ignore[arg-type]  (torch's IterableDataset when there is torch)
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_live_and_die_with_the_rank,
            prefetch_factor=ahead if self.workers else None,
            pin_memory=pin and slots is None,
            timeout=self.timeout_seconds if self.workers else 0,
        )
        step: list[CaptionBatch] = []
        for batch in loader:
            step.append(slots.take(batch, pin) if slots else batch)
            if len(step) == self.layout.grad_accum_steps:
                yield step
                step = []
        assert not step, "a rank's stream ended inside an optimizer step"
