"""Captions of validation photos during training: what the model says now, scored, beside what the base said.

RUN/generations/base.json             before the first step, without the adapter
RUN/generations/step-00000500.json

Each is a list of {"key", "image_id", "prompt", "references", "caption", "answer", "scores"}, one a photo.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.plan import RunPlan, StepLayout, first_samples
from qwenvl_dist.data.prompts import PromptEncoder, PromptStream
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.files import write_atomic
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.fast_path import generating
from qwenvl_dist.model.generate import Answers, answer, answer_all
from qwenvl_dist.model.whole_weights import whole_weights
from qwenvl_dist.scores.boxes import BoxCounts, judge
from qwenvl_dist.scores.captions import ImageCaption, by_image
from qwenvl_dist.scores.coco import CaptionScorer, ScoringFailed
from qwenvl_dist.training.tracking import BASE, GENERATIONS, track_generations

if TYPE_CHECKING:
    from qwenvl_dist.training.metrics import Metrics
    from qwenvl_dist.training.state import TrainState

log = get_logger(__name__)


def _box_scores(counts: BoxCounts) -> dict[str, float]:
    return {"box_precision": counts.precision, "box_recall": counts.recall}


def open_generations(state: TrainState) -> Generations | None:
    """Return what captions validation photos as the recipe says, None when it says nothing."""
    if state.recipe.eval.every_steps is None:
        return None
    assert state.validation is not None, "the recipe demands data.validation"
    config, data = state.recipe.eval, state.recipe.data
    shards = state.validation.shards
    plan = RunPlan(first_samples(shards.manifest.shard_sizes, config.images), seed=0, window=1, shuffle=False)
    # Resized as `evaluate` does it, so that a merged model sees the same pictures.
    rule = ImageSizeRule.of(data.picture_size, state.processor, max_visual_tokens=data.max_visual_tokens)
    encoder = PromptEncoder(SampleEncoder(state.processor, rule, data.max_length))
    layout = StepLayout(state.topology.world_size, config.batch_size, 1)
    stream = PromptStream(shards, plan, layout, encoder, rank=state.topology.rank, workers=0)
    return Generations(state, stream)


class Generations:
    """Generates, scores and writes. All methods are collective."""

    def __init__(self, state: TrainState, stream: PromptStream) -> None:
        self.state, self.stream, self.config = state, stream, state.recipe.eval
        assert self.config.every_steps is not None
        self.every_steps = self.config.every_steps
        self.folder = Path(state.recipe.train.output_dir) / GENERATIONS
        trained = state.engine.module
        self._peft = trained if hasattr(trained, "peft_config") else None
        self.model: Any = trained if self._peft is None else self._peft.get_base_model()

    def write_base(self, metrics: Metrics) -> None:
        """Write what the bare base says, unless an earlier start has done it."""
        state = self.state
        path = self.folder / BASE
        if state.host.from_main(path.exists()):
            return
        step = state.progress.step
        if step and (self._peft is None or state.recipe.model.train):
            log.info("no captions of the base: step %d has changed its own weights", step)
            return
        with self._without_adapter():
            self._write(path, None if step else metrics)

    def write(self, metrics: Metrics) -> None:
        """Write what the model says after the step that was just finished."""
        self._write(self.folder / f"step-{self.state.progress.step:08d}.json", metrics)

    def _write(self, path: Path, metrics: Metrics | None) -> None:
        answers = self._generate()
        if not self.state.topology.is_main:
            return
        for record in answers.bad:
            log.warning("no caption of %s in %s: %s", record.key, record.shard, record.reason)
        mark = self.state.recipe.data.caption_mark
        assert mark is not None, "filled in when the data was opened"
        images = by_image(answers.said, mark, self.config.scored)
        boxes = [judge(i.prompt, "".join(i.references), i.answer, i.crowds) for i in images]
        values, each = self._caption_scores([i for i, b in zip(images, boxes, strict=True) if b is None])
        unused = iter(each)
        each = [next(unused) if b is None else _box_scores(b.counts) for b in boxes]
        counts = sum((b.counts for b in boxes if b is not None), BoxCounts())
        if counts.true:
            values.update(_box_scores(counts))
        entries = [{**image.to_json(), "scores": own} for image, own in zip(images, each, strict=True)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(entries, ensure_ascii=False, indent=1) + "\n").encode())
        except OSError as error:
            raise CheckFailed(
                f"{path} cannot be written: {error.strerror}; mend the storage and start again to resume"
            ) from error
        if metrics:
            metrics.log_generations({**values, "generated_per_second": answers.per_second}, len(images))
            track_generations(self.state)

    def _caption_scores(self, images: list[ImageCaption]) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Return the scores of captions, of all together and of each; empty ones when they cannot be had."""
        if images:
            try:
                with CaptionScorer(self.config.scores) as scorer:
                    scores = scorer.score(images)
                return dict(scores.overall), scores.each
            except ScoringFailed as error:
                log.warning("step %d: captions without scores: %s", self.state.progress.step, error)
        return {}, [{} for _ in images]

    def _generate(self) -> Answers:
        model, config, state = self.model, self.config, self.state
        tokenizer, device = state.processor.tokenizer, state.accelerator.device
        with generating(model), whole_weights(model, state.host) as whole:
            return answer_all(
                self.stream,
                lambda batch: answer(model, batch.to(device), config.max_new_tokens, tokenizer, not whole),
                state.host,
                dummies_too=not whole,
            )

    @contextlib.contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """Make it the bare base for a while. peft also switches gradients off and on; here all stay as they were."""
        if self._peft is None:
            yield
            return
        trains = [(parameter, parameter.requires_grad) for parameter in self._peft.parameters()]
        with self._peft.disable_adapter():
            yield
        for parameter, did in trains:
            parameter.requires_grad_(did)
