"""The plan of a run: parameters, memory under each way of sharing it out, steps, arithmetic, checkpoints, advice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qwenvl_dist.config import PROJECTIONS
from qwenvl_dist.data.plan import StepLayout
from qwenvl_dist.distributed import read_deepspeed_file, shipped_deepspeed_config
from qwenvl_dist.errors import UserError
from qwenvl_dist.model.flops import count_work
from qwenvl_dist.model.peaks import peak_flops
from qwenvl_dist.planning.activations import Activations, Kernels, MicroBatch, activations
from qwenvl_dist.planning.samples import DataFacts, Samples, grids_of, look_at, side_files_bytes
from qwenvl_dist.planning.shapes import Parameter, base_folder_of, parameters_of, read_config, shape_of
from qwenvl_dist.planning.zero import (
    OPTIMIZER_BYTES,
    States,
    ZeroSettings,
    fullest_rank,
    gathered_bytes,
    optimizer_groups,
)

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe
    from qwenvl_dist.synthetic.base import BaseShape

GIB = 1 << 30
# Assumed, not measured: the context of CUDA, NCCL's and the kernels' own memory; and what fragmentation wastes.
FRAMEWORK_BYTES = 3 * GIB // 2
FRAGMENTATION = 0.05
# Assumed rates of the way that bytes take, to rank choices by: bytes a second.
GPU_LINK, NODE_LINK, HOST_LINK, NVME_LINK = 100e9, 12.5e9, 20e9, 3e9
SIDE_FILES = 12  # of a checkpoint, beside the partitions
DEFAULT_GPU = "A100-SXM4-80GB"
DEFAULT_MFU = 0.4
ZERO_1 = "ZeRO-1"
NO_OFFLOAD = ("ZeRO-2", "ZeRO-3", "ZeRO-3, least memory")


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, and beside it."""

    states: States
    activations: Activations

    @property
    def passes(self) -> dict[str, int]:
        """Return what comes one after the other, so that only the largest counts."""
        act = self.activations
        return {"decoder": act.decoder, "logits": act.kept + act.logits, "vision tower": act.tower}

    @property
    def peak(self) -> int:
        """Return the most that a GPU needs."""
        states = self.states
        running = states.gathered + states.buffers + self.activations.peak
        used = states.kept + states.gradients + max(running, states.update)
        return FRAMEWORK_BYTES + int(used * (1 + FRAGMENTATION))

    @property
    def framework(self) -> int:
        """Return what is assumed on top of what is counted."""
        states = self.states
        counted = states.kept + states.gradients
        counted += max(states.gathered + states.buffers + self.activations.peak, states.update)
        return self.peak - counted


@dataclass(frozen=True)
class Choice:
    """One way to share out memory."""

    name: str
    settings: ZeroSettings
    memory: Memory
    fits: bool
    gathered_bytes: int  # whole weights that a rank gathers for a micro-batch
    traffic_seconds: float  # of a step, by the assumed rates
    is_recipes: bool  # what the recipe's DeepSpeed file says

    @property
    def can_train(self) -> bool:
        """Whether `train` takes it."""
        return self.settings.stage in (2, 3)


@dataclass(frozen=True)
class Checkpoints:
    """What a run writes."""

    bytes: int  # of one
    files: int  # of one
    written: int  # over the run
    on_disk: int  # at most at a time: those to keep, the best, and one being written

    @property
    def disk_bytes(self) -> int:
        """Return the most that all take at a time."""
        return self.bytes * self.on_disk

    @property
    def disk_files(self) -> int:
        """Return the most files at a time, folders included."""
        return (self.files + 3) * self.on_disk


@dataclass(frozen=True)
class Arithmetic:
    """Useful floating-point operations and the time that they take at an assumed rate."""

    flops_per_step: float  # over all ranks
    recomputed_share: float  # more, by activation checkpointing
    gpu: str
    peak_flops: float  # of one GPU
    mfu: float
    seconds_per_step: float
    days: float


@dataclass(frozen=True)
class Plan:
    """All of it."""

    recipe: Recipe
    gpus: int  # of a node
    nodes: int
    gpu_memory: int  # bytes of one GPU
    parameters: list[Parameter]
    data: DataFacts
    choices: list[Choice]
    checkpoints: Checkpoints
    arithmetic: Arithmetic
    largest_micro_batch: (
        int | None
    )  # that fits where the recipe's does not; None: no answer was needed or found
    checkpointing_fits: (
        str | None
    )  # the choice that fits with model.checkpointing=all, where none does without

    @property
    def world_size(self) -> int:
        """Return the ranks."""
        return self.gpus * self.nodes

    @property
    def fastest(self) -> Choice | None:
        """Return the choice that fits and moves its bytes in the least time."""
        fitting = [choice for choice in self.choices if choice.fits and choice.can_train]
        return min(fitting, key=lambda choice: choice.traffic_seconds, default=None)

    @property
    def recipes(self) -> Choice:
        """Return what the recipe says as it stands."""
        return next(choice for choice in self.choices if choice.is_recipes)

    def count(self, part: str, trains: bool) -> int:
        """Return the parameters of a part that train, or do not."""
        return sum(p.numel for p in self.parameters if p.part == part and p.trains == trains)


def plan(
    recipe: Recipe,
    gpus: int,
    nodes: int = 1,
    gpu_memory_gib: float = 80.0,
    mfu: float = DEFAULT_MFU,
    gpu: str = DEFAULT_GPU,
    on_cpu: bool = False,
) -> Plan:
    """Return what a run of the recipe takes.

    Args:
        recipe: of the run.
        gpus: on each node.
        nodes: how many.
        gpu_memory_gib: of one GPU.
        mfu: share of the GPU's peak that is reached.
        gpu: its name, of model/peaks.py.
        on_cpu: ranks run without a GPU, whose kernels keep other things.

    Raises:
        UserError: base, data or DeepSpeed file cannot be read or used.
    """
    rate = peak_flops(gpu)
    if rate is None:
        raise UserError(
            f"--gpu {gpu}: its peak is not known; name one as torch does, such as {DEFAULT_GPU}, H100 80GB HBM3, "
            "L40S or RTX 4090"
        )
    config = read_config(recipe.model.base)
    shape = shape_of(config, recipe.model.base)
    parameters = parameters_of(shape, recipe)
    world_size = gpus * nodes
    data, samples = look_at(recipe, world_size)
    facts = _Facts(
        recipe, shape, parameters, gpus, nodes, int(gpu_memory_gib * GIB), data.grad_accum_steps > 1, on_cpu
    )
    largest = replace(data.largest, visual_tokens=0) if data.has_features else data.largest
    choices = facts.choices(largest, recipe.model.checkpoint_every)
    micro_batch = checkpointing = None
    if not any(choice.fits and choice.can_train for choice in choices):
        if recipe.model.checkpoint_every != 1:
            better = facts.fitting(largest, 1)
            checkpointing = better[0].name if better else None
        for count in range(largest.samples - 1, 0, -1):
            if facts.fitting(_of_samples(largest, count), 1):
                micro_batch = count
                break
    return Plan(
        recipe, gpus, nodes, facts.gpu_memory, parameters, data, choices,
        _checkpoints(recipe, parameters, data.total_steps, world_size),
        _arithmetic(facts, samples, data, gpu, rate, mfu), micro_batch, checkpointing,
    )  # fmt: skip


def _of_samples(batch: MicroBatch, samples: int) -> MicroBatch:
    """Return the micro-batch with fewer samples as large as its largest."""

    def share(count: int) -> int:
        return -(-count * samples // batch.samples)

    return replace(
        batch, samples=samples, targets=share(batch.targets), visual_tokens=share(batch.visual_tokens)
    )


@dataclass(frozen=True)
class _Facts:
    """What memory depends on."""

    recipe: Recipe
    shape: BaseShape
    parameters: list[Parameter]
    gpus: int
    nodes: int
    gpu_memory: int
    accumulates: bool
    on_cpu: bool

    @property
    def number_bytes(self) -> int:
        return number_bytes_of(self.recipe)

    @property
    def world_size(self) -> int:
        return self.gpus * self.nodes

    def kernels(self, stage: int) -> Kernels:
        return kernels_of(self.recipe, self.parameters, stage, self.on_cpu)

    def memory(self, settings: ZeroSettings, batch: MicroBatch, checkpoint_every: int) -> Memory:
        lora = self.recipe.lora
        states = fullest_rank(
            self.parameters, self.recipe.optim, settings, self.world_size, self.number_bytes, self.accumulates
        )
        held = activations(
            self.shape, batch, self.kernels(settings.stage), lora.rank if lora else 0,
            lora.target_modules if lora else (), checkpoint_every,
        )  # fmt: skip
        return Memory(states, held)

    def choices(self, batch: MicroBatch, checkpoint_every: int) -> list[Choice]:
        found = []
        for name, settings, is_recipes in zero_settings(self.recipe, self.shape.hidden):
            memory = self.memory(settings, batch, checkpoint_every)
            gathered = gathered_bytes(self.parameters, settings, self.world_size, self.number_bytes)
            found.append(
                Choice(
                    name, settings, memory, memory.peak <= self.gpu_memory, gathered,
                    self._traffic_seconds(settings, memory.states, gathered), is_recipes,
                )
            )  # fmt: skip
        return found

    def fitting(self, batch: MicroBatch, checkpoint_every: int) -> list[Choice]:
        """Return the choices that `train` takes and that fit, the fastest first."""
        found = [c for c in self.choices(batch, checkpoint_every) if c.fits and c.can_train]
        return sorted(found, key=lambda choice: choice.traffic_seconds)

    def _traffic_seconds(self, settings: ZeroSettings, states: States, gathered: int) -> float:
        """Return the seconds of one optimizer step's transfers, one after the other."""
        world, link = self.world_size, GPU_LINK if self.nodes == 1 else NODE_LINK
        micro_batches = self.recipe.grad_accum_steps(world)
        trained = self.number_bytes * sum(p.numel for p in self.parameters if p.trains)
        others = (world - 1) / world
        seconds = micro_batches * gathered * others / link * (1 if settings.overlap else 2)
        # Gradients are reduced after each micro-batch; what was updated is gathered once.
        seconds += (micro_batches + 1) * trained * others / link
        if settings.optimizer_on != "none":
            seconds += 3 * trained / world / HOST_LINK + states.nvme * 2 / NVME_LINK
            seconds += OPTIMIZER_BYTES * 2 * trained / self.number_bytes / world / HOST_LINK
        if settings.weights_on_host:
            seconds += micro_batches * gathered / world / HOST_LINK
        return seconds


def kernels_of(recipe: Recipe, parameters: list[Parameter], stage: int, on_cpu: bool) -> Kernels:
    """Return how the recipe's layers run under a ZeRO stage."""
    lora = recipe.lora
    trains = {p.part for p in parameters if p.trains}
    # As fast_path.install decides.
    fusable = recipe.model.fast_path and "decoder" not in trains
    if lora is not None and (lora.use_dora or lora.lora_bias):
        fusable = False
    tower = bool(trains & {"vision tower", "merger"}) or any(
        p.trains and p.name.startswith("model.visual.") for p in parameters
    )
    return Kernels(
        number_bytes=number_bytes_of(recipe),
        on_cpu=on_cpu,
        fast=fusable,
        fused=fusable and stage != 3,
        dropout=lora is not None and lora.dropout > 0,
        decoder_trains="decoder" in trains,
        tower_trains=tower,
    )


def zero_settings(recipe: Recipe, hidden: int) -> list[tuple[str, ZeroSettings, bool]]:
    """Return each way to share out memory: its name, settings, and whether the recipe's DeepSpeed file says so.

    Those of ds_configs/ and variants of them; the recipe's own file is one more where it is none of these.
    """
    two, three, least, two_offload, three_offload = (
        read_deepspeed_file(shipped_deepspeed_config(f"{name}.json"))["zero_optimization"]
        for name in ("zero2", "zero3", "zero3_least_memory", "zero2_offload", "zero3_offload")
    )
    known: dict[str, dict[str, Any]] = {
        ZERO_1: {**two, "stage": 1},
        "ZeRO-2": two,
        "ZeRO-3": three,
        "ZeRO-3, least memory": least,
        "ZeRO-2, optimizer on the host": two_offload,
        "ZeRO-3, optimizer on the host": {**three, "offload_optimizer": {"device": "cpu"}},
        "ZeRO-3, optimizer and weights on the host": three_offload,
        "ZeRO-3, optimizer on NVMe": {**three, "offload_optimizer": {"device": "nvme"}},
    }
    own = two
    if recipe.deepspeed.config is not None:
        own = read_deepspeed_file(recipe.deepspeed.config)["zero_optimization"]
        if own.get("stage") not in (2, 3):
            raise UserError(
                f"deepspeed.config = {recipe.deepspeed.config}: zero_optimization.stage = {own.get('stage')}, "
                "this toolkit trains under ZeRO 2 or 3; set one of them"
            )
    wanted = ZeroSettings.of(own, hidden)
    found = [
        (name, settings := ZeroSettings.of(zero, hidden), settings == wanted) for name, zero in known.items()
    ]
    if not any(is_recipes for *_, is_recipes in found):
        found.append((f"{Path(recipe.deepspeed.config or '').name}, the recipe's", wanted, True))
    return found


def checkpoints_of(recipe: Recipe, world_size: int, samples_per_epoch: int) -> Checkpoints:
    """Return what a run writes, from config.json and the number of samples alone.

    Raises UserError when config.json cannot be read, or the global batch cannot be dealt.
    """
    shape = shape_of(read_config(recipe.model.base), recipe.model.base)
    layout = StepLayout(world_size, recipe.data.micro_batch_size, recipe.grad_accum_steps(world_size))
    steps = layout.steps(samples_per_epoch * recipe.train.epochs)
    if recipe.train.max_steps is not None:
        steps = min(steps, recipe.train.max_steps)
    return _checkpoints(recipe, parameters_of(shape, recipe), steps, world_size)


def _checkpoints(
    recipe: Recipe, parameters: list[Parameter], total_steps: int, world_size: int
) -> Checkpoints:
    groups = optimizer_groups(parameters, recipe.optim)
    trained = sum(-(-sum(p.numel for p in group) // world_size) * world_size for group in groups)
    side = side_files_bytes(base_folder_of(recipe.model.base))
    train = recipe.train
    every = train.checkpoint_every_steps
    written = total_steps // every + bool(total_steps % every)
    return Checkpoints(
        bytes=(number_bytes_of(recipe) + OPTIMIZER_BYTES) * trained + side,
        files=2 * world_size + SIDE_FILES,
        written=written,
        on_disk=min(written, train.keep_checkpoints + bool(recipe.data.validation) + 1),
    )


def number_bytes_of(recipe: Recipe) -> int:
    """Return the bytes of an element of model.dtype."""
    return 2 if recipe.model.dtype == "bfloat16" else 4


def _arithmetic(
    facts: _Facts, samples: Samples, data: DataFacts, gpu: str, rate: float, mfu: float
) -> Arithmetic:
    shape, lora = facts.shape, facts.recipe.lora
    config = SimpleNamespace(
        vision_config=SimpleNamespace(
            embed_dim=shape.vision_width, spatial_merge_size=2, in_channels=3, temporal_patch_size=2,
            patch_size=14, mlp_ratio=4, depth=shape.vision_depth, hidden_size=shape.hidden,
        ),
        text_config=SimpleNamespace(
            hidden_size=shape.hidden, intermediate_size=shape.intermediate, vocab_size=shape.vocab,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        ),
    )  # fmt: skip
    lengths = samples.length[samples.counted].tolist()
    targets = int(samples.targets[samples.counted].sum())
    grids = [] if data.has_features else grids_of(samples)
    names = [name for name in (lora.target_modules if lora else ()) if name in PROJECTIONS]
    flops = float(count_work(config, grids, lengths, targets, lora.rank if lora else 0, names).flops)
    tower = count_work(config, grids, [], 0, 0, ()).flops
    trains = {p.part for p in facts.parameters if p.trains}
    decoder = sum(p.numel for p in facts.parameters if p.part == "decoder" and len(p.shape) > 1)
    if "decoder" in trains:  # gradients of weights, as much as a forward pass; the head's too where it trains
        flops += 2 * sum(lengths) * decoder
        flops += 2 * targets * shape.hidden * shape.vocab * (shape.tied or "head" in trains)
    kernels = facts.kernels(2)
    if kernels.tower_trains:
        flops += 2 * tower
    every = facts.recipe.model.checkpoint_every
    recomputed = (
        2 * sum(lengths) * decoder * len(range(0, shape.layers, every)) / shape.layers if every else 0
    )
    per_step = flops / len(samples.counted) * data.global_batch_size
    seconds = per_step / (rate * mfu * facts.world_size)
    total = flops / len(samples.counted) * data.total_samples / (rate * mfu * facts.world_size)
    return Arithmetic(per_step, recomputed / flops, gpu, rate, mfu, seconds, total / 86400)


def advice(made: Plan) -> list[str]:
    """Return what to do, in words."""
    lines = []
    fastest, recipes = made.fastest, made.recipes
    room = made.gpu_memory
    if fastest is None:
        closest = min((c for c in made.choices if c.can_train), key=lambda choice: choice.memory.peak)
        short = (closest.memory.peak - room) / GIB
        lines.append(
            f"Nothing fits: {closest.name} comes closest and lacks {short:.1f} GiB with data.micro_batch_size="
            f"{made.recipe.data.micro_batch_size} and model.checkpointing={made.recipe.model.checkpointing}."
        )
        if made.checkpointing_fits:
            lines.append(f"With model.checkpointing=all, {made.checkpointing_fits} fits.")
        elif made.largest_micro_batch:
            lines.append(
                f"With model.checkpointing=all and data.micro_batch_size={made.largest_micro_batch} it fits; raise "
                "train.grad_accum_steps to keep the global batch."
            )
        else:
            lines.append("Not even one sample at a time does: take more or larger GPUs, or smaller pictures.")
        return lines
    spare = (room - fastest.memory.peak) / GIB
    lines.append(f"{fastest.name} fits with {spare:.1f} GiB to spare.")
    if fastest.settings.stage == 2:
        three = next(choice for choice in made.choices if choice.name == "ZeRO-3")
        if three.gathered_bytes:
            saved = (fastest.memory.peak - three.memory.peak) / GIB
            change = f"save {saved:.1f} GiB" if saved > 0 else "save nothing"
            lines.append(
                f"ZeRO-3 would {change} and add {three.gathered_bytes / GIB:.1f} GiB of gathered weights to each "
                "micro-batch of a rank."
            )
    if fastest is not recipes:
        verdict = (
            "fits too, but moves more"
            if recipes.fits
            else (f"lacks {(recipes.memory.peak - room) / GIB:.1f} GiB")
        )
        lines.append(f"The recipe's own setting, {recipes.name}, {verdict}.")
    every = made.recipe.model.checkpoint_every
    if every and spare > 0:
        lines.append(
            f"model.checkpointing={made.recipe.model.checkpointing} costs {made.arithmetic.recomputed_share:.0%} more "
            "arithmetic; try none where there is room."
        )
    if made.nodes > 1 and fastest.settings.stage == 3:
        lines.append("Under ZeRO-3 those weights cross between nodes: their network sets the pace.")
    return lines
