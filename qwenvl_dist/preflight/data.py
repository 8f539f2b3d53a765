"""Checks of the shards: are they those, are they whole, and what is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwenvl_dist.data.mixture import samples_per_epoch
from qwenvl_dist.data.sizes import estimated_tokens
from qwenvl_dist.data.verify import verify_shard
from qwenvl_dist.errors import UserError
from qwenvl_dist.planning.samples import (
    CHAT_TOKENS,
    PICTURE_TOKENS,
    chosen_shards,
    sample_weights,
    size_rule_of,
)
from qwenvl_dist.preflight.checks import Context, Verdict, fail, ok, warn

if TYPE_CHECKING:
    from qwenvl_dist.data.index import ShardIndex

MUCH_CUT = 0.01  # share of samples of which something is taken away


def manifests(context: Context) -> Verdict:
    """All ranks read the same manifests, with samples in them."""
    everyone = context.of_all(lambda: _manifests(context))
    main = everyone[0]
    for rank, other in enumerate(everyone):
        for key, (fingerprint, _) in main.items():
            if other.get(key, ("", ""))[0] != fingerprint:
                return fail(
                    f"{key} has another fingerprint on {context.named([rank])} than on rank 0",
                    "let all nodes read one data set: copies must be those of one packing",
                )
    return ok("; ".join(f"{key} {shown}, {fingerprint[:12]}" for key, (fingerprint, shown) in main.items()))


def _manifests(context: Context) -> dict[str, tuple[str, str]]:
    """Return (fingerprint, description) of each data set that the recipe names."""
    data = context.recipe.data
    parts = context.shards.parts
    counts = samples_per_epoch(data, [part.manifest.samples for part in parts])
    named = list(zip([each.key for each in data.training_sets], parts, counts, strict=True))
    if data.validation:
        try:
            held_out = context.open_shards(data.validation)
        except UserError as error:
            raise UserError(f"data.validation: {error}") from error
        if not held_out.manifest.samples:
            raise UserError(f"data.validation = {data.validation}: holds no samples; pack some first")
        named.append(("data.validation", held_out, held_out.manifest.samples))
    found = {}
    for key, part, count in named:
        manifest = part.manifest
        shown = f"{manifest.samples:,} samples in {len(manifest.shards):,} shards"
        if key.startswith("data.mixture"):
            shown += f" ({count:,} an epoch)"
        found[key] = (manifest.fingerprint, shown)
    return found


def sampled_shards(context: Context) -> Verdict:
    """Some shards of each data set, other ones on each rank, hold what the manifest says, byte for byte."""
    shards = context.shards
    filled = [number for number, entry in enumerate(shards.manifest.shards) if entry.samples]
    chosen = _spread(context, filled)
    numbers = chosen[context.host.rank :: context.host.world_size]
    parts = context.of_all(
        lambda: [(number, fault) for number in numbers for fault in verify_shard(*shards.stored(number))]
    )
    faulty = [found for part in parts for found in part]
    faults = [fault for _, fault in faulty]
    looked = sum(shards.manifest.shards[number].samples for number in chosen)
    shown = f"{len(chosen)} of {len(filled)} shards, {looked:,} samples"
    if not faults:
        return ok(shown)
    number, first = faulty[0]
    shard = shards.manifest.shards[number].name
    where = shard if first.key is None else f"{first.key} in {shard}"
    shown += f": {len(faults)} faults, such as {where}: {first.reason}"
    remedy = f"qwenvl-dist shards verify {shards.stored(number)[0].location} names all; copy or pack these shards again"
    whole = [fault for fault in faults if fault.key is None]
    if whole or len(faults) > context.recipe.data.bad_sample_budget * looked:
        return fail(shown, remedy)
    return warn(shown, remedy)


def _spread(context: Context, filled: list[int]) -> list[int]:
    """Return so many of these shards as the ranks look at, spread over all; of each data set one at least."""
    wanted = context.sampled_shards * context.host.world_size
    chosen = {filled[i] for i in np.linspace(0, len(filled) - 1, wanted).astype(int).tolist()}
    first = 0
    for part in context.shards.parts if wanted else ():
        own = [number for number in filled if first <= number < first + len(part.manifest.shards)]
        if own and chosen.isdisjoint(own):
            chosen.add(own[len(own) // 2])
        first += len(part.manifest.shards)
    return sorted(chosen)


def _indexes(context: Context) -> Iterator[tuple[int, ShardIndex]]:
    """Yield numbers and indexes of the shards that the plan reads too, but for those that cannot be read."""
    shards = context.shards
    for number in chosen_shards([part.manifest for part in shards.parts]):
        with contextlib.suppress(UserError, OSError):  # `sampled_shards` tells of damage
            yield number, shards.index(number)


def _tokens(context: Context) -> tuple[NDArray[np.int64], list[tuple[str, ShardIndex]]]:
    """Return (samples, 2) visual and text tokens of the samples of the indexes."""
    rule = size_rule_of(context.recipe.data)
    names = [entry.name for entry in context.shards.manifest.shards]
    found = [(names[number], index) for number, index in _indexes(context)]
    if not found:
        raise UserError(
            f"{context.recipe.data.training_sets[0]}: no index of it can be read; copy or pack the data again"
        )
    tokens = [estimated_tokens(index, rule.visual_tokens, rule.max_visual_tokens) for _, index in found]
    return np.concatenate(tokens), found


def _share(context: Context, are: NDArray[np.bool_]) -> float:
    """Return the share of an epoch's samples of which something is true, by the rows of `_tokens`."""
    parts = [part.manifest for part in context.shards.parts]
    owners = np.repeat(np.arange(len(parts)), [len(manifest.shards) for manifest in parts])
    read = np.zeros(len(parts), np.int64)
    for number, index in _indexes(context):
        read[owners[number]] += len(index)
    counts = samples_per_epoch(context.recipe.data, [manifest.samples for manifest in parts])
    return float(np.average(are, weights=sample_weights(counts, read.tolist())))


def _place(row: int, indexes: list[tuple[str, ShardIndex]]) -> tuple[str, str, ShardIndex, int]:
    """Return (shard, key, index, number in it) of a row of `_tokens`."""
    for shard, index in indexes:
        if row < len(index):
            return shard, index.keys[row], index, row
        row -= len(index)
    raise AssertionError("a row of the tokens has a place")


def lengths(context: Context) -> Verdict:
    """Visual tokens fit into data.max_length; how much has to be cut, shrunk or dropped for that."""
    data = context.recipe.data
    tokens, indexes = _tokens(context)
    frame = CHAT_TOKENS + PICTURE_TOKENS
    hopeless = tokens[:, 0] + frame >= data.max_length
    if data.over_length == "shrink":
        hopeless = frame + tokens[:, 1] >= data.max_length
    too_long = tokens.sum(axis=1) + frame > data.max_length
    share = _share(context, hopeless)
    longest = int(tokens.sum(axis=1).max()) + frame
    shown = f"longest about {longest} tokens of data.max_length = {data.max_length}"
    if hopeless.any():
        row = int(np.argmax(np.where(hopeless, tokens.sum(axis=1), 0)))
        shard, key, _, _ = _place(row, indexes)
        value = (
            f"{share:.2%} of samples cannot fit into data.max_length = {data.max_length}, such as {key} in {shard} "
            f"with {tokens[row, 0]} visual tokens"
        )
        remedy = "raise data.max_length, or let pictures be smaller: data.image_size, data.max_visual_tokens"
        if data.over_length != "drop" and share > data.bad_sample_budget:
            return fail(value, remedy)  # visual tokens are never cut: each would be a bad sample
        return warn(value, remedy)
    long_share = _share(context, too_long)
    if long_share > MUCH_CUT:
        did = {"cut": "lose the end of the caption", "shrink": "get smaller pictures", "drop": "are left out"}
        return warn(
            f"{shown}; {long_share:.1%} of samples {did[data.over_length]}",
            "raise data.max_length, or let pictures be smaller: data.image_size, data.max_visual_tokens",
        )
    return ok(shown)


def text_only(context: Context) -> Verdict:
    """How many samples have no picture; every rank runs the vision tower all the same."""
    tokens, _ = _tokens(context)
    share = _share(context, tokens[:, 0] == 0)
    if share == 1:
        return warn("no sample has a picture", "look at what was packed: qwenvl-dist shards show")
    return ok(f"{share:.1%} of samples")


def extremes(context: Context) -> Verdict:
    """Which samples are the longest and the largest."""
    tokens, indexes = _tokens(context)
    shown = []
    for name, row in (
        ("longest text", int(tokens[:, 1].argmax())),
        ("most visual tokens", int(tokens[:, 0].argmax())),
    ):
        shard, key, index, number = _place(row, indexes)
        sizes = index.images(number).tolist()
        size = f", {' '.join(f'{w}x{h}' for w, h in sizes[:3])} pixels" if sizes else ""
        shown.append(
            f"{name}: {key} in {shard}, about {tokens[row, 1]} text and {tokens[row, 0]} visual tokens{size}"
        )
    return ok("; ".join(shown))


def worst_samples(context: Context, count: int, budget: int | None) -> list[tuple[int, int]]:
    """Return (shard, number in it) of the samples of the largest micro-batch that could come up.

    The longest ones, the one with the most visual tokens among them; under a budget of visual tokens as many as fit.
    """
    tokens, indexes = _tokens(context)
    total = tokens.sum(axis=1)
    rows = list(
        dict.fromkeys([int(tokens[:, 0].argmax()), *np.argsort(-total, kind="stable")[:count].tolist()])
    )
    if budget:
        limited = np.minimum(tokens[rows, 0], budget)
        rows = [row for row, seen in zip(rows, np.cumsum(limited), strict=True) if seen <= budget] or rows[:1]
    names = [entry.name for entry in context.shards.manifest.shards]
    found = []
    for row in rows[:count]:
        shard, _, _, number = _place(row, indexes)
        found.append((names.index(shard), number))
    return found
