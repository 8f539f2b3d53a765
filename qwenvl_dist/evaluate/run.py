"""What `evaluate` does: loss, captions and scores of one or several models over packed shards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenvl_dist.data.captions import DEFAULT_JOIN
from qwenvl_dist.data.index import BadSample
from qwenvl_dist.data.plan import RunPlan, StepLayout, first_samples
from qwenvl_dist.data.prompts import PromptStream
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream
from qwenvl_dist.distributed import HostGroup, OneRank
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.evaluate.captioner import Captioner
from qwenvl_dist.evaluate.compare import Comparison
from qwenvl_dist.evaluate.loss import mean_token_loss
from qwenvl_dist.evaluate.results import ADAPTER, BASE, MERGED, Measured, Results
from qwenvl_dist.logs import get_logger, progress
from qwenvl_dist.model.generate import Answers, answer_all
from qwenvl_dist.scores.captions import Scored, by_image
from qwenvl_dist.scores.coco import KINDS, CaptionScorer, Scores, ScoringFailed, missing_java

log = get_logger(__name__)
Load = Callable[[str, Path | None], Captioner]


def models_to_compare(
    load: Load, model: str, adapter: Path | None = None, merged: Path | None = None
) -> Iterator[tuple[str, Captioner]]:
    """Yield each model by name, ready to speak: MODEL alone, with its adapter, and what was merged from both.

    A model is there only until the next one is asked for: two of 7B need not fit beside each other.
    """
    captioner = load(model, adapter)
    with captioner.without_adapter():
        yield BASE, captioner
    if adapter is not None:
        yield ADAPTER, captioner
    if merged is not None:
        del captioner
        yield MERGED, load(str(merged), None)


@dataclass(frozen=True)
class Scoring:
    """Which scores, of what part of an answer."""

    kinds: Sequence[str] = KINDS
    scored: Scored = "first"
    mark: str = DEFAULT_JOIN  # between the captions of an answer, and of a reference


class ShardEvaluation:
    """The first `limit` samples of packed shards (all when None), in their order, each once over all ranks."""

    def __init__(
        self,
        shards: str | Path,
        *,
        limit: int | None,
        batch_size: int,
        workers: int = 0,
        host: HostGroup | OneRank | None = None,
    ) -> None:
        self.shards = ShardSet(shards)
        self.shards.require_pictures()
        sizes = first_samples(self.shards.manifest.shard_sizes, limit)
        self.plan = RunPlan(sizes, seed=0, window=1, shuffle=False)
        if not self.plan.total_samples:
            raise UserError(f"--shards {shards}: holds no samples; pack some first")
        self.host = host or OneRank()
        self.layout = StepLayout(self.host.world_size, batch_size, 1)
        self.workers = workers

    @property
    def _own_total(self) -> int:
        return math.ceil(self.plan.total_samples / self.host.world_size)

    def loss(self, captioner: Captioner, description: str) -> float:
        """Return the mean token loss of the model as it stands now. Collective."""
        stream = CaptionStream(
            self.shards, self.plan, self.layout, captioner.encoder, rank=self.host.rank, workers=self.workers
        )
        with progress(total=self._own_total, description=description) as bar:
            return mean_token_loss(captioner.model, stream, self.host, bar.advance)

    def answers(self, captioner: Captioner, max_new_tokens: int, description: str = "captions") -> Answers:
        """Return what the model as it stands now says to all readable samples. Collective."""
        stream = PromptStream(
            self.shards,
            self.plan,
            self.layout,
            captioner.prompt_encoder(),
            rank=self.host.rank,
            workers=self.workers,
        )
        with progress(total=self._own_total, description=description) as bar:
            return answer_all(
                stream,
                lambda batch: captioner.answer(batch, max_new_tokens),
                self.host,
                advance=bar.advance,
            )

    def pictures(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the first picture of each of these samples that has one."""
        wanted, found = set(keys), {}
        for position in range(self.plan.total_samples):
            if not wanted:
                break
            (place,) = self.plan.locate(position, 1)
            assert place is not None, "the position lies inside the plan"
            try:
                raw = self.shards.read(place)
            except BadSample:
                continue
            if raw.key in wanted and raw.images:
                found[raw.key] = raw.images[0]
            wanted.discard(raw.key)
        return found


def evaluate(
    work: ShardEvaluation,
    models: Iterable[tuple[str, Captioner]],
    out: Path,
    *,
    title: str,
    max_new_tokens: int,
    scoring: Scoring = Scoring(),
) -> tuple[dict[str, Any], list[Comparison]]:
    """Measure models on shards; rank 0 scores, and writes predictions, numbers and a page into `out`. Collective.

    Returns the numbers and the rows of the page, both empty on other ranks. Raises CheckFailed when no sample could be
    read, and when the scores could not be computed although Java is there; what was said is written then.
    """
    began = time.monotonic()
    is_main = work.host.rank == 0
    kinds, missing = scoring.kinds, missing_java() if scoring.kinds else None
    if missing:
        kinds = ()
        if is_main:
            log.warning("no scores, predictions only: %s", missing)
    measured: dict[str, Measured] = {}
    for name, captioner in models:
        loss = work.loss(captioner, f"loss of {name}")
        answers = work.answers(captioner, max_new_tokens, f"captions of {name}")
        images = by_image(answers.said, scoring.mark, scoring.scored)
        measured[name] = Measured(loss, answers, images, Scores({}, [{} for _ in images]))
        log.info("%s: %d captions, %.2f a second", name, len(answers.said), answers.per_second)
        require_some(answers, work)
        del captioner  # before the next one is loaded
    if not is_main:
        return {}, []
    failure: ScoringFailed | None = None
    try:
        with CaptionScorer(kinds) as scorer:
            for name, each in measured.items():
                measured[name] = replace(each, scores=scorer.score(each.images))
    except ScoringFailed as error:
        failure = error
    results = Results(measured, round(time.monotonic() - began, 3))
    rows = results.write(out, title, work.pictures)
    if failure:
        raise CheckFailed(f"{failure}; what was said is in {out}") from failure
    return results.numbers, rows


def require_some(answers: Answers, work: ShardEvaluation) -> None:
    """Raise CheckFailed when no sample could be read."""
    if not answers.said:
        first = answers.bad[0]
        raise CheckFailed(
            f"--shards {work.shards.storage.location}: none of {len(answers.bad)} samples could be read, "
            f"first {first.key}: {first.reason}; look with `qwenvl-dist shards verify`"
        )
