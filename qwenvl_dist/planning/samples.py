"""What a run will compute: the samples of its steps, their lengths and padding, from manifest and indexes alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_dist.data.captions import as_packed
from qwenvl_dist.data.index import Manifest, ShardIndex, read_shard_index
from qwenvl_dist.data.mixture import make_plan, samples_per_epoch
from qwenvl_dist.data.plan import Plan, StepLayout, deal_by_budget, deal_by_length
from qwenvl_dist.data.sizes import CHARACTERS_PER_TOKEN, ImageSizeRule, estimated_tokens
from qwenvl_dist.data.storage import ReadPolicy, StorageError, open_storage
from qwenvl_dist.errors import UserError
from qwenvl_dist.logs import get_logger
from qwenvl_dist.planning.activations import PATCHES_PER_TOKEN, MicroBatch

if TYPE_CHECKING:
    from qwenvl_dist.config import DataConfig, Recipe

Int64 = NDArray[np.int64]
log = get_logger(__name__)

SHARDS_READ = 64  # indexes, spread over the data set: enough for its distribution
POSITIONS_WALKED = 40_000  # samples whose micro-batches are looked at
BUDGETED_STEPS = 24  # dealing by a budget is slower
SAMPLES_COUNTED = 2048  # whose arithmetic is counted
# Tokens of a conversation around its texts: the default system turn, the user's and the assistant's marks.
CHAT_TOKENS = 21
PICTURE_TOKENS = 2  # around its visual tokens
DUMMY_TOKENS = CHAT_TOKENS + PICTURE_TOKENS + 1
END_OF_TURN = 1  # is learned too
# Of English captions joined by a mark, as measured on 290 COCO photos with five each. The stream deals by its own
# CHARACTERS_PER_TOKEN, a part of the order that must not change.
CHARACTERS_PER_ANSWER_TOKEN = 4.25


@dataclass(frozen=True, eq=False)
class Samples:
    """What is known of the samples of the shards that were read; one row each, a dummy last."""

    visual: Int64  # tokens
    text: Int64  # tokens by which the stream deals
    length: Int64  # tokens, all
    targets: Int64
    largest_picture: Int64  # visual tokens
    pictures: list[Int64]  # visual tokens of each picture of the samples counted
    counted: Int64  # those samples
    shard_sizes: Int64
    weights: NDArray[np.float64]  # how many of an epoch's samples each row stands for, the dummy left out


@dataclass(frozen=True)
class SourceFacts:
    """One data set of a mixture."""

    samples: int
    samples_per_epoch: int  # of the run
    passes: float  # over it, in the whole run; train.max_steps left out


@dataclass(frozen=True)
class DataFacts:
    """What the data makes of a run. Everything that depends on text is an estimate."""

    samples: int  # of an epoch
    shards: int
    shards_read: int
    sources: dict[str, SourceFacts]  # of a mixture, by name
    has_features: bool
    text_only_share: float
    global_batch_size: int
    grad_accum_steps: int
    steps_per_epoch: int
    total_steps: int
    total_samples: int
    tokens_per_sample: float
    target_tokens_per_sample: float
    visual_tokens_per_sample: float
    padding_share: float
    largest: MicroBatch  # of all micro-batches that were looked at, dimension by dimension


def look_at(recipe: Recipe, world_size: int) -> tuple[DataFacts, Samples]:
    """Return what the recipe's training data makes of a run on so many ranks.

    Raises UserError when manifest or indexes cannot be read, or the global batch cannot be dealt.
    """
    manifests, indexes = _read(recipe.data)
    recipe = as_packed(recipe, manifests)
    data, train = recipe.data, recipe.train
    counts = samples_per_epoch(data, [manifest.samples for manifest in manifests])
    sizes = [np.array([len(index) for index in part], np.int64) for part in indexes]
    weights = sample_weights(counts, [int(part.sum()) for part in sizes])
    samples = _describe(data, [index for part in indexes for index in part], weights)
    accumulation = recipe.grad_accum_steps(world_size)
    layout = StepLayout(world_size, data.micro_batch_size, accumulation)
    padding, largest = _micro_batches(data, samples, make_plan(data, sizes, counts), layout)
    epoch = sum(counts)
    total = epoch * train.epochs
    steps = layout.steps(total)
    if train.max_steps is not None:
        steps = min(steps, train.max_steps)

    def mean(column: NDArray[Any]) -> float:
        return float(np.average(column[:-1], weights=samples.weights))  # without the dummy

    return DataFacts(
        samples=epoch,
        shards=sum(len(manifest.shards) for manifest in manifests),
        shards_read=sum(len(part) for part in indexes),
        sources={
            each.name: SourceFacts(manifest.samples, count, count * train.epochs / manifest.samples)
            for each, manifest, count in zip(data.training_sets, manifests, counts, strict=True)
            if data.mixture
        },
        has_features=manifests[0].features is not None,
        text_only_share=mean(samples.visual == 0),
        global_batch_size=layout.global_batch_size,
        grad_accum_steps=accumulation,
        steps_per_epoch=layout.steps(epoch),
        total_steps=steps,
        total_samples=min(total, steps * layout.global_batch_size),
        tokens_per_sample=mean(samples.length),
        target_tokens_per_sample=mean(samples.targets),
        visual_tokens_per_sample=mean(samples.visual),
        padding_share=padding,
        largest=largest,
    ), samples


def _read(data: DataConfig) -> tuple[list[Manifest], list[list[ShardIndex]]]:
    """Return the manifest of each training set and some indexes of its shards."""
    storages, manifests = [], []
    for each in data.training_sets:
        storages.append(open_storage(each.place, ReadPolicy(data.read_timeout_seconds, data.read_retries)))
        try:
            manifests.append(Manifest.load(storages[-1]))
        except UserError as error:
            raise UserError(f"{each.key}: {error}") from error
        if not manifests[-1].samples:
            raise UserError(f"{each}: holds no samples; pack some first")
    joined = [(part, entry) for part, manifest in enumerate(manifests) for entry in manifest.shards]
    indexes: list[list[ShardIndex]] = [[] for _ in manifests]
    failures = []
    for number in chosen_shards(manifests):
        part, entry = joined[number]
        try:
            indexes[part].append(read_shard_index(storages[part], entry.name, entry.index_sha256))
        except OSError as error:
            reason = error if isinstance(error, StorageError) else error.strerror
            failures.append(
                f"{data.training_sets[part]}: the index of {entry.name} cannot be read ({reason})"
            )
        except UserError as error:
            failures.append(f"{data.training_sets[part]}: {error}")
    if not all(indexes):
        raise UserError(failures[0])
    if failures:  # a run leaves out the samples of such a shard, too
        log.warning("left out of the estimate: %d indexes, such as %s", len(failures), failures[0])
    return manifests, indexes


def chosen_shards(manifests: Sequence[Manifest]) -> list[int]:
    """Return the numbers of the shards whose indexes are read, spread over all that hold samples.

    Shards are numbered through the manifests, each of which gets the same number of them.
    """
    chosen, first = [], 0
    for manifest in manifests:
        filled = [first + number for number, shard in enumerate(manifest.shards) if shard.samples]
        spread = np.linspace(0, len(filled) - 1, max(1, SHARDS_READ // len(manifests))).astype(int)
        chosen += [filled[i] for i in np.unique(spread).tolist()]
        first += len(manifest.shards)
    return chosen


def sample_weights(counts: Sequence[int], read: Sequence[int]) -> NDArray[np.float64]:
    """Return of each sample that was read, so many of each training set, how many of an epoch's it stands for."""
    return np.repeat(np.array(counts) / np.maximum(read, 1), read)


def _skeleton_bytes(pictures: int) -> int:
    """Return the bytes of a packed sample's JSON with one question and one answer, their text left out."""
    text: list[dict[str, Any]] = [{"type": "text", "text": ""}]
    messages = [
        {"role": "user", "content": [{"type": "image"}] * pictures + text},
        {"role": "assistant", "content": text},
    ]
    return len(json.dumps({"messages": messages, "image_id": 100000, "source": "coco"}))


def size_rule_of(data: DataConfig) -> ImageSizeRule:
    """Return the size of the recipe's pictures by Qwen2-VL's own patches, for which no processor is loaded."""
    size = data.picture_size
    if isinstance(size, int):
        return ImageSizeRule(side=size)
    return ImageSizeRule(None, size.min_pixels, size.max_pixels, max_visual_tokens=data.max_visual_tokens)


def _describe(data: DataConfig, indexes: Sequence[ShardIndex], weights: NDArray[np.float64]) -> Samples:
    rule = size_rule_of(data)
    visual, text, prompts, counts, by_picture = [], [], [], [], []
    for index in indexes:
        tokens = estimated_tokens(index, rule.visual_tokens, rule.max_visual_tokens)
        visual.append(tokens[:, 0])
        text.append(tokens[:, 1])
        count = np.diff(index.image_starts)
        counts.append(count)
        skeletons = np.array([_skeleton_bytes(n) for n in range(int(count.max(initial=0)) + 1)])
        prompts.append(np.maximum(0, _json_bytes(index) - index.learned_lengths - skeletons[count]))
        sizes, which = np.unique(index.image_sizes, axis=0, return_inverse=True)
        each = np.array([rule.visual_tokens(w, h) for w, h in sizes.tolist()], np.int64)[which.reshape(-1)]
        by_picture.append(each)
    seen, pictures = np.concatenate(visual), np.concatenate(counts)
    characters = np.concatenate([index.learned_lengths for index in indexes])
    answer = np.rint(characters / CHARACTERS_PER_ANSWER_TOKEN).astype(np.int64)
    prompt = (np.concatenate(prompts) / CHARACTERS_PER_TOKEN).astype(np.int64)
    targets = answer + END_OF_TURN
    length = seen + answer + prompt + CHAT_TOKENS + PICTURE_TOKENS * pictures
    excess = np.maximum(0, length - data.max_length)
    left_out = excess > 0  # a dummy takes its place
    if data.over_length == "cut":
        left_out = (excess > 0) & (excess >= answer)  # no cut of the answer is enough
        targets = targets - excess
    elif data.over_length == "shrink":
        left_out = (excess > 0) & (seen - excess < pictures)
        seen = seen - excess
    seen = np.where(left_out, 1, seen)
    targets = np.where(left_out, 0, targets)
    length = np.where(left_out, DUMMY_TOKENS, length - excess)
    flat, ends = np.concatenate(by_picture), np.cumsum(pictures)
    largest = np.zeros(len(seen), np.int64)
    some = pictures > 0
    if some.any():
        largest[some] = np.maximum.reduceat(flat, (ends - pictures)[some])
    largest = np.minimum(largest, seen)
    counted = np.unique(np.linspace(0, len(seen) - 1, SAMPLES_COUNTED).astype(np.int64))
    return Samples(
        visual=np.append(seen, 1),
        text=np.append(np.concatenate(text), 0),
        length=np.append(length, DUMMY_TOKENS),
        targets=np.append(targets, 0),
        largest_picture=np.append(largest, 1),
        pictures=[flat[ends[i] - pictures[i] : ends[i]] for i in counted.tolist()],
        counted=counted,
        shard_sizes=np.array([len(index) for index in indexes], np.int64),
        weights=weights,
    )


def _json_bytes(index: ShardIndex) -> Int64:
    found = np.zeros(len(index), np.int64)
    if "json" in index.extensions:
        owner = np.repeat(np.arange(len(index)), np.diff(index.member_starts))
        chosen = index.extension_ids == index.extensions.index("json")
        found[owner[chosen]] = index.sizes[chosen]
    return found


def _micro_batches(
    data: DataConfig, samples: Samples, plan: Plan, layout: StepLayout
) -> tuple[float, MicroBatch]:
    """Return the share of padding and the largest micro-batch of the first epoch."""
    size, per = layout.global_batch_size, data.micro_batch_size
    steps = min(layout.steps(plan.total_samples), max(1, POSITIONS_WALKED // size))
    budget = data.micro_batch_visual_tokens
    if budget:
        steps = min(steps, BUDGETED_STEPS)
    starts = np.cumsum(samples.shard_sizes) - samples.shard_sizes
    shards, inside = plan.find(np.arange(steps * size))
    rows = np.where(shards < 0, len(samples.length) - 1, starts[shards] + inside).reshape(steps, size)
    visual, length = samples.visual, samples.length
    groups: list[Int64] | Int64
    if budget:
        groups = []
        sizes = []  # (length, visual tokens) of each micro-batch's samples
        for row in rows:
            deal = deal_by_budget(visual[row], samples.text[row], size // per, budget)
            for group in (row[micro_batch] for micro_batch in deal.micro_batches):
                shrunk = visual[group] if deal.limit is None else np.minimum(visual[group], deal.limit)
                groups.append(group)
                sizes.append((length[group] - (visual[group] - shrunk), shrunk))
    else:
        if data.length_grouping:
            order = deal_by_length((visual + samples.text)[rows])
            rows = np.take_along_axis(rows, order, axis=1)
        groups = rows.reshape(-1, per)
        sizes = list(zip(length[groups], visual[groups], strict=True))
    real = sum(int(lengths.sum()) for lengths, _ in sizes)
    areas = [len(lengths) * int(lengths.max()) for lengths, _ in sizes]
    widest, _ = sizes[int(np.argmax(areas))]
    return 1 - real / sum(areas), MicroBatch(
        samples=len(widest),
        length=int(widest.max()),
        targets=max(int(samples.targets[group].sum()) for group in groups),
        visual_tokens=max(int(seen.sum()) for _, seen in sizes),
        largest_picture=min(int(samples.largest_picture.max()), budget or 1 << 62),
        segmented=data.captions_mode == "each",
    )


def grids_of(samples: Samples) -> list[tuple[int, int, int]]:
    """Return a (1, 1, patches) grid for each picture of the samples counted: what their arithmetic depends on."""
    return [
        (1, 1, PATCHES_PER_TOKEN * tokens) for each in samples.pictures for tokens in each.tolist() if tokens
    ]


def side_files_bytes(base: Path) -> int:
    """Return about how many bytes tokenizer and processor files of a base take in a checkpoint.

    transformers writes one tokenizer.json, which for vocabulary and merges alone has 2.6 times their bytes.
    """
    single = base / "tokenizer.json"
    if single.is_file():
        return single.stat().st_size
    parts = [base / name for name in ("vocab.json", "merges.txt")]
    return sum(int(2.6 * part.stat().st_size) for part in parts if part.is_file())
