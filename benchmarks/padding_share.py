"""How much of a batch is padding when a global batch is dealt as it comes, by length, by a budget of visual tokens.

    python benchmarks/padding_share.py SHARDS --processor FOLDER [--min-pixels N --max-pixels N] [--budget SHARE]

The budget of a micro-batch is SHARE times what its samples have on average; pictures of a fixed size cannot have one.

Walks one epoch of real shards through the training stream on every rank of the given layouts and counts tokens.
Prints a table; figures depend on the data and the seed alone.
"""

from __future__ import annotations

import argparse

import torch

from qwenvl_dist.config import PixelRange
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from qwenvl_dist.model.load import load_processor

LAYOUTS = [
    StepLayout(2, 4, 1),
    StepLayout(4, 4, 1),
    StepLayout(4, 4, 4),
    StepLayout(8, 4, 4),
    StepLayout(4, 16, 4),
]


def padding_share(
    shards: ShardSet,
    encoder: SampleEncoder,
    layout: StepLayout,
    grouped: bool,
    budget: int | None = None,
) -> tuple[float, float]:
    """Return the share of padding, and the tokens that ranks wait for one another in lockstep, as shares of all."""
    plan = RunPlan(shards.manifest.shard_sizes, seed=0, window=64)
    ranks = [
        CaptionStream(
            shards,
            plan,
            layout,
            encoder,
            rank=rank,
            workers=0,
            length_grouping=grouped,
            visual_token_budget=budget,
        ).iterate()
        for rank in range(layout.world_size)
    ]
    real = padded = lockstep = 0
    for steps in zip(*ranks, strict=True):
        for together in zip(*steps, strict=True):  # the micro-batches that all ranks run at the same time
            sizes = [batch.input_ids.numel() for batch in together]
            real += sum(int((batch.input_ids != encoder.chat.pad_token).sum()) for batch in together)
            padded += sum(sizes)
            lockstep += max(sizes) * len(sizes)
    return 1 - real / padded, 1 - real / lockstep


def mean_visual_tokens(shards: ShardSet, encoder: SampleEncoder) -> float:
    """Return the visual tokens of a sample, on average over all shards."""
    sizes = [
        size
        for number in range(len(shards.manifest.shards))
        for size in shards.index(number).image_sizes.tolist()
    ]
    return sum(encoder.size_rule.visual_tokens(*size) for size in sizes) / shards.manifest.samples


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--processor", required=True, help="a model folder with the hub's processor files")
    parser.add_argument("--min-pixels", type=int, default=4 * 28 * 28)
    parser.add_argument("--max-pixels", type=int, default=1280 * 28 * 28)
    parser.add_argument("--budget", type=float, default=1.1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = load_processor(args.processor)
    sizes = PixelRange(min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    shards = ShardSet(args.shards)
    columns = ["image_size", "world x batch x accumulation"]
    columns += [column for kind in ("padding", "lockstep") for column in (kind, "by length", "by budget")]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for size in (280, sizes):
        name = str(size) if isinstance(size, int) else f"{size.min_pixels}-{size.max_pixels} pixels"
        encoder = SampleEncoder(processor, ImageSizeRule.of(size, processor), 8192, exact_resize=False)
        for layout in LAYOUTS:
            found = [padding_share(shards, encoder, layout, by_length) for by_length in (False, True)]
            if not isinstance(size, int):
                budget = int(args.budget * layout.micro_batch_size * mean_visual_tokens(shards, encoder))
                found.append(padding_share(shards, encoder, layout, True, budget))
            shape = f"{layout.world_size} x {layout.micro_batch_size} x {layout.grad_accum_steps}"
            cells = [
                [f"{shares[kind]:.1%}" for shares in found] + ["-"] * (3 - len(found)) for kind in (0, 1)
            ]
            print(f"| {name} | {shape} | {' | '.join(cells[0] + cells[1])} |", flush=True)


if __name__ == "__main__":
    main()
