"""The page: what a run folder tells, put into words, tables and charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qwenvl_dist.report.charts import Curve, draw
from qwenvl_dist.report.folder import SCORE_NAMES, Record, RunFolder
from qwenvl_dist.report.gallery import make_gallery

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
BAD_SAMPLES_SHOWN = 50
ADJUSTMENTS = {  # of samples above the recipe's limits, counted once a pass
    "cut": "answers ended early, in all epochs",
    "shrunk": "smaller pictures, in all epochs",
    "dropped": "too long, in all epochs",
}
NUMBERS_SHOWN = 40  # rows of the table behind the curves

Fact = tuple[str, str]


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and what it shows in words."""

    title: str
    svg: Markup
    words: str


def report_page(run: RunFolder, most_photos: int) -> str:
    """Return a run's page: HTML with everything inside, no script."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "score": lambda value: "–" if value is None else f"{value:.3f}",
        "bytes": describe_bytes,
        "revision": short_revision,
        "moment": lambda text: text.replace("T", " ").replace("+00:00", " UTC"),
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=run.setting("tracking", "name") or run.path.resolve().name,
        folder=str(run.path),
        status=status(run),
        tiles=tiles(run),
        figures=figures(run),
        numbers=_evenly(run.steps, NUMBERS_SHOWN),
        gallery=make_gallery(run, most_photos),
        score_names=[name for name in SCORE_NAMES if any(name in line for line in run.scores)],
        scores=run.scores,
        checkpoints=run.checkpoints,
        bad_samples=run.bad_samples[:BAD_SAMPLES_SHOWN],
        num_bad_samples=len(run.bad_samples),
        sources=sources(run),
        facts=facts(run),
        launches=run.launches,
        versions=run.launches[-1].get("versions", {}) if run.launches else {},
        deepspeed=_deepspeed(run),
        recipe=run.recipe_text,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        made_with=f"qwenvl-dist {version('qwenvl-dist')}",
    )


def number(value: Any, digits: int = 4) -> str:
    """Return a number with so many significant digits, a dash for none."""
    if not isinstance(value, int | float):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def describe_bytes(count: int) -> str:
    """Return a size in the largest decimal unit below it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def short_revision(revision: str) -> str:
    """Return the beginning of a commit's name, and whether there were changes on top."""
    commit, dash, dirty = revision.partition("-")
    return commit[:10] + dash + dirty


def status(run: RunFolder) -> str:
    """Return how far the run is."""
    total = run.total_steps
    if total is None:
        return f"step {run.last_step:,}"
    if run.last_step >= total:
        return f"finished, {total:,} steps"
    return f"unfinished, step {run.last_step:,} of {total:,}"


def tiles(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the few numbers to see first: name, value, remark."""
    found: list[tuple[str, str, str]] = []
    if run.steps:
        first, last = run.steps[0], run.steps[-1]
        found.append(
            ("training loss", number(last["loss"]), f"{number(first['loss'])} at step {first['step']}")
        )
    if run.validations:
        best = min(run.validations, key=lambda line: line["val_loss"])
        found.append(("best validation loss", number(best["val_loss"]), f"at step {best['step']}"))
    ranked = [line for line in run.scores if line.get("CIDEr") is not None]
    if ranked:
        best = max(ranked, key=lambda line: line["CIDEr"])
        found.append(("best CIDEr", f"{best['CIDEr']:.3f}", f"at step {best['step']}"))
    speeds = [line["samples_per_second"] for line in run.steps if line.get("samples_per_second")]
    if speeds:
        found.append(
            ("samples per second", number(sorted(speeds)[len(speeds) // 2], 3), "median of all lines")
        )
    memory = [line["peak_memory_gib"] for line in run.steps if line.get("peak_memory_gib") is not None]
    if memory:
        found.append(("peak memory", f"{number(max(memory), 3)} GiB", "of the largest rank"))
    if run.bad_samples:
        found.append(("bad samples", f"{len(run.bad_samples):,}", "left out"))
    for what, remark in ADJUSTMENTS.items():
        count = run.steps[-1].get(f"{what}_samples") if run.steps else None
        if count:
            found.append((f"samples {what}", f"{count:,}", remark))
    return found


def figures(run: RunFolder) -> list[Figure]:
    """Return the charts for which there are numbers."""
    resumed_at = sorted({launch["step"] for launch in run.launches if launch.get("step")})
    found: list[Figure] = []

    def curve(label: str, lines: Sequence[Record], key: str, factor: float = 1.0) -> Curve | None:
        known = [(line["step"], _value(line, key)) for line in lines]
        points = [(step, value * factor) for step, value in known if isinstance(value, int | float)]
        return Curve(label, *zip(*points, strict=True)) if points else None

    def add(name: str, title: str, curves: Sequence[Curve | None], from_zero: bool = True) -> None:
        shown = [each for each in curves if each is not None]
        if shown:
            alt = f"{title}. {'; '.join(in_words(each) for each in shown)}."
            svg = draw(name, shown, alt, resumed_at, from_zero=from_zero)
            ends = (
                f"{each.label} {number(each.values[0], 3)} → {number(each.values[-1], 3)}" for each in shown
            )
            found.append(Figure(title, Markup(svg), ", ".join(ends)))

    steps, scores = run.steps, run.scores
    losses = [curve("training", steps, "loss"), curve("validation", run.validations, "val_loss")]
    add("loss", "Loss per target token", losses, from_zero=False)
    add("cider", "CIDEr of validation photos", [curve("CIDEr", scores, "CIDEr")])
    others = [curve(name, scores, name) for name in ("Bleu_4", "METEOR", "ROUGE_L")]
    add("scores", "Other caption scores", others)
    shares = [curve(name, scores, f"box_{name}") for name in ("recall", "precision")]
    add("boxes", "Boxes of validation photos at IoU 0.5", shares)
    add("rate", "Learning rate", [curve("learning rate", steps, "learning_rate")])
    add("norm", "Gradient norm before clipping", [curve("norm", steps, "grad_norm")])
    add("speed", "Samples per second", [curve("all ranks", steps, "samples_per_second")])
    add(
        "wait", "Waiting for data, % of the time", [curve("slowest rank", steps, "data_wait_fraction", 100.0)]
    )
    paces = [curve(f"{name} node", steps, f"own_seconds/{name}") for name in ("slowest", "median", "fastest")]
    add("pace", "Seconds before waiting for others, a step", paces)
    add("memory", "Peak memory, GiB", [curve("largest rank", steps, "peak_memory_gib")])
    add("mfu", "Model FLOPs utilisation, %", [curve("mean of ranks", steps, "mfu", 100.0)])
    return found


def _value(line: Record, key: str) -> Any:
    """Return what stands under a key, or under keys with a slash between them."""
    value: Any = line
    for part in key.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def in_words(curve: Curve) -> str:
    """Say where a curve begins and ends, and between what it lies."""
    values = [value for value in curve.values if value is not None]
    if len(values) == 1:
        return f"{curve.label}: {number(values[0])} at step {curve.steps[0]}"
    return (
        f"{curve.label}: {number(values[0])} at step {curve.steps[0]}, {number(values[-1])} at step {curve.steps[-1]}, "
        f"between {number(min(values))} and {number(max(values))}"
    )


@dataclass(frozen=True)
class SourceRow:
    """A data set of a mixture, and how far the run is in it."""

    name: str
    place: str
    share: str  # what the recipe says of it
    samples: int | None
    epoch: float | None  # passes over it


def sources(run: RunFolder) -> list[SourceRow]:
    """Return a row for each data set of the recipe's mixture, none where there is no mixture."""
    reached = _value(run.steps[-1], "sources") if run.steps else None
    rows = []
    for entry in run.setting("data", "mixture") or ():
        name, epochs, weight = (entry.get(key) for key in ("name", "epochs", "weight"))
        said = f"weight {number(weight)}"
        if epochs is not None:
            said = f"{number(epochs)} {'pass' if epochs == 1 else 'passes'} an epoch"
        own = (reached or {}).get(name, {})
        rows.append(SourceRow(str(name), str(entry.get("train")), said, own.get("samples"), own.get("epoch")))
    return sorted(rows, key=lambda row: row.name)


def facts(run: RunFolder) -> list[Fact]:
    """Return what ran: name and value."""
    get: Callable[..., Any] = run.setting
    last: Record = run.launches[-1] if run.launches else {}
    found: list[tuple[str, Any]] = [("base", get("model", "base"))]
    lora = get("lora")
    if isinstance(lora, dict):
        rank, alpha, dropout = (number(lora.get(key)) for key in ("rank", "alpha", "dropout"))
        found.append(("adapter", f"LoRA, rank {rank}, alpha {alpha}, dropout {dropout}"))
        found.append(("trained modules", ", ".join(map(str, lora.get("target_modules") or ()))))
    found += [
        ("trained fully", ", ".join(get("model", "train") or ()) or None),
        ("training data", _with_count(_training_data(run), last.get("samples_per_epoch"))),
        ("validation data", _with_count(get("data", "validation"), last.get("validation_samples"))),
        ("prompt", last.get("prompt")),
        ("pictures", _picture_size(get("data", "image_size"))),
        ("global batch", _global_batch(run, last)),
        (
            "optimiser",
            f"AdamW, {get('optim', 'schedule')} from {number(get('optim', 'learning_rate'))}"
            if get("optim")
            else None,
        ),
        ("precision", get("model", "dtype")),
        ("topology", _topology(last)),
        ("revision", last.get("git_revision")),
    ]
    return [(name, str(value)) for name, value in found if value]


def _training_data(run: RunFolder) -> str | None:
    names = [row.name for row in sources(run)]
    return f"mixture of {', '.join(names)}" if names else run.setting("data", "train")


def _with_count(place: str | None, count: int | None) -> str | None:
    return f"{place} ({count:,} samples)" if place and count else place


def _picture_size(size: Any) -> str | None:
    if isinstance(size, dict):
        return f"{size.get('min_pixels'):,} to {size.get('max_pixels'):,} pixels, aspect ratio kept"
    return f"{size} × {size} pixels" if size else None


def _global_batch(run: RunFolder, launch: Record) -> str | None:
    micro, world = run.setting("data", "micro_batch_size"), launch.get("world_size")
    accumulation, size = launch.get("grad_accum_steps"), launch.get("global_batch_size")
    return f"{size:,} samples: {micro} × accumulation {accumulation} × {world} ranks" if size else None


def _topology(launch: Record) -> str | None:
    if not launch:
        return None
    hosts = launch.get("hosts") or {}
    ranks = "1 rank" if launch.get("world_size") == 1 else f"{launch.get('world_size')} ranks"
    where = f"{len(hosts)} host{'s' if len(hosts) != 1 else ''}"
    return f"{ranks} on {where}, ZeRO-{launch.get('zero_stage')}, {launch.get('device')}"


def _deepspeed(run: RunFolder) -> str:
    config = run.launches[-1].get("deepspeed") if run.launches else None
    return json.dumps(config, indent=2) if config else ""


def _evenly(lines: Sequence[Record], most: int) -> list[Record]:
    """Return at most so many of the lines, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]
