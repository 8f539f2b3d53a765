"""`data.captions_mode: sample`: of a photo's several captions one an epoch, by the plan alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from qwenvl_dist.data.formats import is_learned, parse_sample_json, texts_in
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.plan import Plan
from qwenvl_dist.data.source import PlannedSample


class CaptionDraw:
    """A stage of the pipeline: samples -> the same samples with one caption each. Picklable.

    What is drawn depends on seed, sample and epoch: not on ranks, workers, or where a run was resumed. Every caption of
    a photo comes once before any comes again.
    """

    def __init__(self, plan: Plan, mark: str) -> None:
        self.plan, self.mark = plan, mark

    def __call__(self, samples: Sequence[PlannedSample]) -> list[PlannedSample]:
        """Draw for the samples of one micro-batch."""
        return [self._drawn(sample) for sample in samples]

    def _drawn(self, sample: PlannedSample) -> PlannedSample:
        raw, place = sample.raw, sample.slot.place
        if raw is None or place is None:
            return sample
        try:
            record = parse_sample_json(raw.json)
        except ValueError:
            return sample  # a bad sample, which the encoder names
        captions = captions_of(record["messages"], self.mark)
        if len(captions) < 2:
            return sample
        chosen = captions[self.plan.draw(sample.slot.position, place, len(captions))]
        record["messages"][-1]["content"] = [{"type": "text", "text": chosen}]
        return replace(sample, raw=RawSample(raw.key, {**raw.members, "json": json.dumps(record).encode()}))


def captions_of(messages: list[dict], mark: str) -> list[str]:
    """Return the captions in the last turn; none where it is not the only one to learn."""
    *before, last = messages
    if not is_learned(last) or any(map(is_learned, before)):
        return []
    return [caption for caption in map(str.strip, "".join(texts_in([last])).split(mark)) if caption]
