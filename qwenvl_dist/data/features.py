"""Precomputed vision features in a shard: what a sample holds instead of its pictures.

    KEY.features       (visual tokens, hidden) bfloat16, little-endian: all pictures of the sample one after another
    KEY.features.json  {"sizes": [[width, height], ...], "grids": [[1, rows, columns], ...], "shape": [tokens, hidden]}:
                       the pictures as stored and in patches; {"sizes": ..., "bad": reason} where they gave no features
    KEY.json           as it was

A sample without pictures has its JSON alone. The `features` of the manifest say which tower and which image settings
they are of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvl_dist.data.chat import Grid, image_tokens
from qwenvl_dist.data.index import FEATURES, FEATURES_RECORD
from qwenvl_dist.data.sizes import UnreadableImage

Sizes = Sequence[Sequence[int]]  # (width, height) of each picture


@dataclass(frozen=True)
class SampleFeatures:
    """The pictures of one sample, as the language model reads them."""

    values: Tensor  # (visual tokens, hidden) bfloat16
    sizes: list[list[int]] = field(default_factory=list)  # width and height of each picture as stored
    grids: tuple[Grid, ...] = ()

    def check_shape(self, hidden: int, merge_size: int) -> None:
        """Raise ValueError unless there are as many rows, as wide, as this model takes for the grids."""
        expected = (sum(image_tokens(grid, merge_size) for grid in self.grids), hidden)
        if tuple(self.values.shape) != expected:
            raise ValueError(f"{FEATURES}: of shape {tuple(self.values.shape)}, the model takes {expected}")

    def to_members(self) -> dict[str, bytes]:
        """Return the members of the shard, none without a picture."""
        if not self.grids:
            return {}
        record = {"sizes": self.sizes, "grids": self.grids, "shape": list(self.values.shape)}
        bits = self.values.contiguous().view(torch.int16).numpy().astype("<i2", copy=False)
        return {FEATURES: bits.tobytes(), FEATURES_RECORD: json.dumps(record).encode()}


def bad_members(sizes: Sizes, reason: str) -> dict[str, bytes]:
    """Return the members of a sample whose pictures gave no features."""
    return {FEATURES_RECORD: json.dumps({"sizes": sizes, "bad": reason}).encode()}


def read_features(members: Mapping[str, bytes]) -> SampleFeatures:
    """Return a sample's features. UnreadableImage with the reason that was noted, ValueError for a damaged record."""
    if FEATURES_RECORD not in members:
        if FEATURES in members:
            raise ValueError(f"{FEATURES_RECORD}: missing member")
        return SampleFeatures(torch.empty(0, 0, dtype=torch.bfloat16))
    sizes, grids, shape = _parse(members[FEATURES_RECORD])
    data = members.get(FEATURES, b"")
    if len(data) != 2 * math.prod(shape):
        raise ValueError(f"{FEATURES}: {len(data)} bytes, its record says {shape} in bfloat16")
    bits = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(shape)
    return SampleFeatures(bits.view(torch.bfloat16), sizes, grids)


def _parse(data: bytes) -> tuple[list[list[int]], tuple[Grid, ...], list[int]]:
    try:
        record: dict[str, Any] = json.loads(data)
        if "bad" in record:
            raise UnreadableImage(str(record["bad"]))
        sizes = [[int(width), int(height)] for width, height in record["sizes"]]
        grids = tuple((int(t), int(h), int(w)) for t, h, w in record["grids"])
        shape = [int(n) for n in record["shape"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{FEATURES_RECORD}: damaged ({type(error).__name__}: {error})") from None
    if len(sizes) != len(grids) or len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{FEATURES_RECORD}: {len(sizes)} sizes of {len(grids)} pictures, shape {shape}")
    return sizes, grids, shape
