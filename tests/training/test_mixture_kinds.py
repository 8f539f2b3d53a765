"""Captions, boxes, pages, chats of no to three pictures in one run: however it is split, all of it learns the same."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.grounding import read_coco_instances
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.synthetic.pages import write_pages
from qwenvl_dist.synthetic.scenes import write_scenes
from tests.made_shards import write_shards
from tests.ranks import run_ranks
from tests.report.made_run import keys_of
from tests.training.runs import ledger, losses, read_lines, run_several, write_recipe
from tests.training.test_mixed import members_of

pytestmark = pytest.mark.dist
STOP = 4  # optimizer steps of 8 samples
MICRO, BUDGET = 2, 24  # samples and visual tokens of a micro-batch; a page has up to 15
TOLERANCE = 2e-5  # float32 sums in another order
# Passes of an epoch of the run, of which there are two. In DRAWN the captions make five: as many as a photo has.
PASSES = {"captions": 1, "boxes": 0.5, "pages": 2.2, "chats": 1}
DRAWN = {"captions": 2.5, "boxes": 0.5, "chats": 1}
BUDGETED = {
    "image_size": {"min_pixels": 784, "max_pixels": 12544},
    "micro_batch_visual_tokens": BUDGET,
}
RUNS: dict[str, tuple[int, dict[str, float], dict[str, Any]]] = {  # ZeRO stage, passes, how batches are made
    "zero3": (3, PASSES, BUDGETED),
    "zero2": (2, PASSES, BUDGETED),
    "sample": (2, DRAWN, {"captions_mode": "sample", "length_grouping": False}),
    "sample-by-length": (2, DRAWN, {"captions_mode": "sample"}),
    "each": (2, PASSES, {"captions_mode": "each", "length_grouping": False}),
    "each-by-length": (3, PASSES, {"captions_mode": "each"}),
}
RESUMED = ("zero3", "sample", "each")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 photos with five captions, 3 questions about boxes of each of 6, 5 pages, 9 chats of 0 to 3 pictures."""
    folder = tmp_path_factory.mktemp("sets")
    scenes = write_scenes(folder / "scenes", 8, size=84, style="plain5", validation_count=0)["train"]
    pack(read_coco_captions(scenes, scenes.parent / "images"), folder / "captions", samples_per_shard=3)
    boxes = read_coco_instances(scenes.with_name("instances.json"), scenes.parent / "images", "both")
    pack(list(boxes)[:18], folder / "boxes", samples_per_shard=7)
    pages = write_pages(folder / "drawn", 5, words=6, width=168, height=112, validation_count=0)["train"]
    pack(read_coco_captions(pages, pages.parent / "images"), folder / "pages", samples_per_shard=4)
    chats = [members_of(number, number % 4) for number in range(9)]
    write_shards(folder / "chats", [chats[:5], chats[5:]])
    return folder


def run_noted(recipes: list[str]) -> None:
    """One rank: one run after another; what each micro-batch learned is noted in its run folder."""
    from qwenvl_dist.training import loop

    train_step = loop.train_step

    def noted(state: Any, micro_batches: Any, *more: Any) -> Any:
        with Path(state.recipe.train.output_dir, f"noted-{state.topology.rank}.jsonl").open("a") as file:
            for batch in micro_batches:
                learned: dict[int, list[int]] = defaultdict(list)
                rows = batch.labels[:, 1:].ne(-100).nonzero()[:, 0].tolist()
                for row, token in zip(rows, batch.target_ids.tolist(), strict=True):
                    learned[batch.positions[row]].append(token)
                samples = list(zip(learned, batch.keys, learned.values(), strict=True))
                file.write(json.dumps([len(batch.image_positions), len(batch.grids), samples]) + "\n")
        return train_step(state, micro_batches, *more)

    loop.train_step = noted
    run_several(recipes)


class Noted:
    """What the micro-batches of a run learned, over all ranks."""

    def __init__(self, run: Path, processor: Any) -> None:
        lines = [json.loads(line) for path in run.glob("noted-*.jsonl") for line in path.open()]
        self.visual_tokens = [(tokens, len(samples)) for tokens, _, samples in lines]
        # By position: key and text. A position that was made again after a resume has to be the same.
        self.samples: dict[int, tuple[str, str]] = {}
        for position, key, tokens in sorted(sample for *_, samples in lines for sample in samples):
            got = key, processor.tokenizer.decode(tokens)
            assert self.samples.setdefault(position, got) == got

    def texts(self, source: str) -> Iterator[tuple[str, list[str]]]:
        """Yield each key of a set with what was learned of it, pass by pass."""
        by_key: dict[str, list[str]] = defaultdict(list)
        for key, text in self.samples.values():
            by_key[key].append(text)
        yield from ((key, texts) for key, texts in by_key.items() if key.startswith(f"{source}/"))


@pytest.fixture(scope="module")
def runs(sets: Path, scenes_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, on two ranks; those of RESUMED also stopped there and gone on with on one."""
    folder = tmp_path_factory.mktemp("runs")

    def recipe(name: str, out: str, max_steps: int | None = None, accumulation: int = 2) -> str:
        stage, passes, data = RUNS[name]
        mixture = [{"train": str(sets / each), "epochs": count} for each, count in passes.items()]
        return str(
            write_recipe(
                folder / f"{out}-{accumulation}.yaml", scenes_base, sets, folder / out, stage,
                data={"train": "", "mixture": mixture, "image_size": 84, "micro_batch_size": MICRO,
                      "shuffle_window": 2, **data},
                optim={"schedule": "constant", "warmup_ratio": 0.0},  # else the rate depends on where a run ends
                train={"max_steps": max_steps, "epochs": 2, "grad_accum_steps": accumulation,
                       "checkpoint_every_steps": STOP},
            )
        )  # fmt: skip

    two = [recipe(name, name) for name in RUNS] + [recipe(name, f"{name}-resumed", STOP) for name in RESUMED]
    run_ranks("tests.training.test_mixture_kinds:run_noted", 2, timeout=400, recipes=two)
    one = [recipe(name, f"{name}-resumed", accumulation=4) for name in RESUMED]
    run_ranks("tests.training.test_mixture_kinds:run_noted", 1, timeout=400, recipes=one)
    return folder


def keys_by_set(sets: Path, passes: dict[str, float]) -> dict[str, list[str]]:
    return {name: [f"{name}/{key}" for key in keys_of(sets / name)] for name in passes}


@pytest.mark.parametrize("name", RUNS)
def test_each_set_makes_its_passes(runs: Path, sets: Path, name: str) -> None:
    _, passes, _ = RUNS[name]
    counts = Counter(key for keys in ledger(runs / name).values() for key in keys)
    own = keys_by_set(sets, passes)
    assert set(counts) == {key for keys in own.values() for key in keys}
    last = [line for line in read_lines(runs / name / "metrics.jsonl") if "loss" in line][-1]
    for source, keys in own.items():
        total = 2 * round(passes[source] * len(keys))
        assert sum(counts[key] for key in keys) == total
        assert {counts[key] for key in keys} <= {total // len(keys), -(-total // len(keys))}
        reached = {"samples": total, "epoch": pytest.approx(total / len(keys), abs=1e-6)}
        assert last["sources"][source] == reached
    assert not read_lines(runs / name / "bad_samples.jsonl")
    assert losses(runs / name)[-1] < losses(runs / name)[0]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_on_one_rank_is_the_run_that_never_stopped(
    runs: Path, scenes_processor: Any, name: str
) -> None:
    straight, resumed = runs / name, runs / f"{name}-resumed"
    assert len(losses(straight)) > 2 * STOP
    assert ledger(resumed) == ledger(straight)
    assert losses(resumed) == pytest.approx(losses(straight), rel=TOLERANCE)
    samples = Noted(straight, scenes_processor).samples
    assert Noted(resumed, scenes_processor).samples == samples and list(samples) == list(range(len(samples)))


def test_zero_2_and_zero_3_learn_the_same_within_the_budget(runs: Path, scenes_processor: Any) -> None:
    assert ledger(runs / "zero2") == ledger(runs / "zero3")
    assert losses(runs / "zero2") == pytest.approx(losses(runs / "zero3"), rel=TOLERANCE)
    for name in ("zero2", "zero3", "zero3-resumed"):
        noted = Noted(runs / name, scenes_processor).visual_tokens
        assert max(tokens for tokens, _ in noted) <= BUDGET
        assert {samples for _, samples in noted if samples > MICRO}  # the budget deals, not the number
        last = [line for line in read_lines(runs / name / "metrics.jsonl") if "loss" in line][-1]
        assert last["shrunk_samples"] > 0


@pytest.mark.parametrize("name", ["sample", "sample-by-length", "sample-resumed"])
def test_each_photo_takes_each_caption_once_before_any_again(
    runs: Path, sets: Path, scenes_processor: Any, name: str
) -> None:
    wanted = answers_of(sets, "captions")
    drawn = dict(Noted(runs / name, scenes_processor).texts("captions"))
    assert set(drawn) == set(wanted)
    for key, texts in drawn.items():
        assert sorted(texts) == sorted(f"{text}<|im_end|>" for text in wanted[key].split("&&"))
    orders = {tuple(wanted[key].split("&&").index(t.removesuffix("<|im_end|>")) for t in texts)
              for key, texts in drawn.items()}  # fmt: skip
    assert len(orders) > 4  # of 8 photos: each has an order of its own
    for source in ("boxes", "chats"):  # without a mark the text is what it was
        for key, texts in Noted(runs / name, scenes_processor).texts(source):
            assert set(texts) == {answers_of(sets, source)[key] + "<|im_end|>"}


def test_dealing_by_length_draws_the_same_captions(runs: Path, scenes_processor: Any) -> None:
    plain, grouped = (Noted(runs / name, scenes_processor) for name in ("sample", "sample-by-length"))
    assert plain.samples == grouped.samples
    assert ledger(runs / "sample") == ledger(runs / "sample-by-length")


def answers_of(sets: Path, source: str) -> dict[str, str]:
    """Return the packed answer of each sample of a set."""
    from qwenvl_dist.data.plan import Place

    shards = ShardSet(sets / source)
    answers = {}
    for shard, entry in enumerate(shards.manifest.shards):
        for sample in range(entry.samples):
            raw = shards.read(Place(shard, sample))
            (part,) = json.loads(raw.json)["messages"][-1]["content"]
            answers[f"{source}/{raw.key}"] = part["text"]
    return answers


def test_each_learns_every_caption_beside_sets_without_the_mark(
    runs: Path, sets: Path, scenes_processor: Any
) -> None:
    for name in ("each", "each-by-length", "each-resumed"):
        noted = Noted(runs / name, scenes_processor)
        for source in ("boxes", "captions", "chats", "pages"):
            wanted = answers_of(sets, source)
            for key, texts in noted.texts(source):
                assert set(texts) == {"".join(f"{text}<|im_end|>" for text in wanted[key].split("&&"))}
    assert losses(runs / "each-by-length")[0] == pytest.approx(losses(runs / "each")[0], rel=TOLERANCE)
