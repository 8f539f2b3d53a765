"""Every knob a user has: a recipe is YAML, checked against these models. Imports no torch.

A recipe names only what differs from the defaults; the defaults are the article's run (280 pixels, LoRA r=8
alpha=16 dropout 0.1 on the seven projections, 1e-4, 4 x 4, 10 epochs). What the DeepSpeed file says (ZeRO stage,
offload, buckets) is never repeated here, and what stands here (batch sizes, clipping, precision) never there.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qwenvl_dist.data.captions import CaptionsMode, attention_conflict
from qwenvl_dist.errors import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINABLE_PARTS = ("vision", "merger", "language", "head")
VISUAL_TOKEN_SIDE = 28  # pixels: patch_size 14 x spatial_merge_size 2, the same in every model of the family


class _Section(BaseModel):
    # Strict: `rank: true` is no 1 and `rank: "8"` no 8.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False
    )


_List = Field(strict=False)  # YAML has lists, the recipe keeps tuples
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ModelConfig(_Section):
    """Which base, and how it computes."""

    base: str = "Qwen/Qwen2-VL-2B-Instruct"  # a folder in hub layout, or a hub id
    attention: Literal["auto", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpointing: str = (
        "none"  # activation checkpointing of language layers: none | every_k | every_<n> | all
    )
    checkpointing_k: Annotated[int, Field(ge=2)] = 2  # the k of every_k
    fast_path: bool = (
        True  # our own forward and backward of frozen layers; false: transformers' and peft's modules
    )
    # Parts trained fully, beside LoRA.
    train: Annotated[tuple[Literal["vision", "merger", "language", "head"], ...], _List] = ()

    @field_validator("checkpointing")
    @classmethod
    def _known_checkpointing(cls, value: str) -> str:
        if not re.fullmatch(r"none|all|every_k|every_[1-9][0-9]*", value):
            raise ValueError("must be none, all, every_k or every_<n> such as every_2")
        return value

    @property
    def checkpoint_every(self) -> int:
        """Recompute each n-th language layer in the backward pass; 0 keeps all activations."""
        if self.checkpointing in ("none", "all"):
            return int(self.checkpointing == "all")
        suffix = self.checkpointing.removeprefix("every_")
        return self.checkpointing_k if suffix == "k" else int(suffix)


class LoraConfig(_Section):
    """The adapter, in peft's terms; scaling is alpha / rank, with rsLoRA alpha / sqrt(rank)."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    target_modules: Annotated[tuple[str, ...], _List] = PROJECTIONS
    use_rslora: bool = False
    use_dora: bool = False  # also a trained length for each row of the weight
    lora_bias: bool = (
        False  # also a bias of lora_B, for layers that have one: of the language model q_proj, k_proj, v_proj
    )
    # Of single modules: a regular expression for the end of the name, such as `layers.[0-3].self_attn.q_proj`.
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    modules_to_save: Annotated[tuple[str, ...], _List] = ()  # train as whole copies that the adapter holds

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _regular_expressions(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"holds {pattern!r}, which is no regular expression ({error}); correct it"
                ) from None
        return value

    @model_validator(mode="after")
    def _bias_without_dora(self) -> LoraConfig:
        if self.lora_bias and self.use_dora:
            raise ValueError(
                "lora_bias and use_dora are both true, which peft does not combine; drop one of them"
            )
        return self

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one module; to train without an adapter write `lora: null`")
        return value


class PixelRange(_Section):
    """Keep the aspect ratio, with an area between these bounds (Qwen's rule)."""

    min_pixels: Annotated[int, Field(ge=VISUAL_TOKEN_SIDE**2)] = 4 * VISUAL_TOKEN_SIDE**2
    max_pixels: Annotated[int, Field(ge=VISUAL_TOKEN_SIDE**2)] = 1280 * VISUAL_TOKEN_SIDE**2

    @model_validator(mode="after")
    def _ordered(self) -> PixelRange:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; swap or widen them"
            )
        return self


OverLength = Literal["cut", "drop", "shrink"]


class SourceConfig(_Section):
    """One data set of a mixture, and how much of an epoch it is."""

    train: str = ""  # folder or URL of shards with manifest.json
    name: str = ""  # the last part of `train` where the recipe gives none
    epochs: Annotated[float, Field(gt=0)] | None = None  # passes over it in an epoch of the run
    weight: Annotated[float, Field(gt=0)] | None = (
        None  # its share of an epoch's samples, beside other weights
    )

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_folder(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        place = value.get("train")
        if place in (None, ""):
            raise ValueError(
                "names no shards: give the entry `train`, a folder or URL of what `shards pack` wrote"
            )
        if value.get("name") is None and isinstance(place, str):
            return {**value, "name": PurePosixPath(urlsplit(place).path).name}
        return value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                "must be letters, digits, '.', '_' and '-', since keys and metrics carry it; give the entry a name"
            )
        return value

    @model_validator(mode="after")
    def _epochs_or_weight(self) -> SourceConfig:
        if (self.epochs is None) == (self.weight is None):
            said = (
                "neither epochs nor weight"
                if self.epochs is None
                else (f"both epochs = {self.epochs:g} and weight = {self.weight:g}")
            )
            raise ValueError(
                f"{self.name} has {said}: say one of them, passes in an epoch of the run or a share of its samples"
            )
        return self


@dataclass(frozen=True)
class TrainingSet:
    """A data set that a run trains on, as the recipe names it."""

    name: str  # "" where it is the only one
    place: str
    epochs: float | None = 1.0
    weight: float | None = None

    @property
    def key(self) -> str:
        """Return where the recipe names it."""
        return f"data.mixture {self.name}" if self.name else "data.train"

    def __str__(self) -> str:
        return f"{self.key} = {self.place}"


class DataConfig(_Section):
    """Where samples come from and how they become batches."""

    train: str = ""  # folder or URL of shards with manifest.json
    mixture: Annotated[tuple[SourceConfig, ...], _List] = ()  # several of them, instead of train
    validation: str | None = None
    image_size: int | PixelRange = 280  # pixels a side (square, as in the article), or a range
    # Torch's fixed-point bicubic, or Pillow's own: five times the time for one level of difference now and then.
    resize: Literal["fast", "exact"] = "fast"
    # None: as the shards were packed for (`shards pack --captions-mode`), else join
    captions_mode: CaptionsMode | None = None
    # What separates captions in the shards' text; None: what they were packed with, else &&.
    caption_mark: Annotated[str, Field(min_length=1)] | None = None
    max_length: Annotated[int, Field(ge=16)] = 8192  # tokens; visual ones are never cut
    # Of a sample above max_length: cut the end of its answer, drop the sample, or shrink its pictures until it fits.
    over_length: OverLength = "cut"
    max_visual_tokens: Annotated[int, Field(ge=1)] | None = None  # of a sample, whose pictures shrink to it
    micro_batch_size: Annotated[int, Field(ge=1)] = 4  # samples in one forward pass of one rank
    # Of one forward pass. Then micro_batch_size is only the mean: many small samples or few large ones go together.
    micro_batch_visual_tokens: Annotated[int, Field(ge=1)] | None = None
    workers: Annotated[int, Field(ge=0)] = 2  # loader processes per rank
    seed: Seed = 0
    shuffle_window: Annotated[int, Field(ge=1)] = 64  # shards mixed at a time
    # Samples of a global batch are dealt by length into micro-batches: less padding, the same gradient.
    length_grouping: bool = True
    ledger: bool = False  # write the sample keys of every step
    bad_sample_budget: Annotated[float, Field(ge=0, le=1)] = (
        0.001  # share of the data set that may be unreadable
    )
    cache_dir: str | None = None  # keeps whole copies of shards on this node; None reads them in parts
    cache_gib: Annotated[float, Field(gt=0)] = 100  # of all copies in cache_dir
    read_timeout_seconds: Annotated[float, Field(gt=0)] = 60  # a remote place that sends nothing for so long
    read_retries: Annotated[int, Field(ge=0)] = (
        5  # after which a sample that a remote place holds is a bad one
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _side_or_range(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, dict, PixelRange)):
            raise ValueError(
                "must be the side of a square in pixels, such as 280, or a section with min_pixels and max_pixels"
            )
        return value

    @field_validator("mixture")
    @classmethod
    def _one_kind_and_own_names(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} entries are named {name}; give each a name of its own")
        weighed = [source.name for source in value if source.weight is not None]
        if weighed and len(weighed) < len(value):
            passing = next(source.name for source in value if source.weight is None)
            raise ValueError(
                f"{weighed[0]} has a weight and {passing} has epochs: all entries must say the same of the two, "
                "since weights share out an epoch whose length epochs would change"
            )
        return value

    @property
    def training_sets(self) -> tuple[TrainingSet, ...]:
        """The data sets to train on: that of `train`, or those of `mixture` by name, however the recipe orders them."""
        if not self.mixture:
            return (TrainingSet("", self.train),)
        ordered = sorted(self.mixture, key=lambda source: source.name)
        return tuple(TrainingSet(s.name, s.train, s.epochs, s.weight) for s in ordered)

    @property
    def training_places(self) -> str:
        """Where they lie, for a person."""
        return ", ".join(each.place for each in self.training_sets)

    @property
    def picture_size(self) -> int | PixelRange:
        """The size of a sample's only picture: image_size, and no more than max_visual_tokens gives."""
        if isinstance(self.image_size, int) or self.max_visual_tokens is None:
            return self.image_size
        most = min(self.image_size.max_pixels, self.max_visual_tokens * VISUAL_TOKEN_SIDE**2)
        return PixelRange(min_pixels=min(self.image_size.min_pixels, most), max_pixels=most)

    @model_validator(mode="after")
    def _pictures_can_shrink(self) -> DataConfig:
        if isinstance(self.image_size, int):
            for key, value in {
                "over_length": "shrink" if self.over_length == "shrink" else None,
                "max_visual_tokens": self.max_visual_tokens,
                "micro_batch_visual_tokens": self.micro_batch_visual_tokens,
            }.items():
                if value is not None:
                    raise ValueError(
                        f"{key} is {value}, but image_size is {self.image_size}: pictures of a fixed size cannot "
                        f"shrink; give image_size a section with min_pixels and max_pixels, or drop {key}"
                    )
        return self

    @model_validator(mode="after")
    def _budget_can_be_kept(self) -> DataConfig:
        budget = self.micro_batch_visual_tokens
        if budget is None or isinstance(self.image_size, int):
            return self
        if not self.length_grouping:
            raise ValueError(
                f"micro_batch_visual_tokens is {budget} and length_grouping is false: the budget deals samples by "
                "length; drop one of them"
            )
        least = self.micro_batch_size * max(1, self.image_size.min_pixels // VISUAL_TOKEN_SIDE**2)
        if budget < least:
            raise ValueError(
                f"micro_batch_visual_tokens is {budget}: must be at least micro_batch_size x the tokens of "
                f"min_pixels = {least}; raise it, or lower one of those"
            )
        return self

    @field_validator("image_size")
    @classmethod
    def _whole_tokens(cls, value: int | PixelRange) -> int | PixelRange:
        if isinstance(value, int) and (value < VISUAL_TOKEN_SIDE or value % VISUAL_TOKEN_SIDE):
            low = max(1, value // VISUAL_TOKEN_SIDE) * VISUAL_TOKEN_SIDE
            raise ValueError(
                f"must be a positive multiple of {VISUAL_TOKEN_SIDE} pixels (one visual token), "
                f"such as {low} or {low + VISUAL_TOKEN_SIDE}"
            )
        return value


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(_Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    # Of single parts of the model, adapters on them included; the others take learning_rate.
    learning_rates: dict[Literal["vision", "merger", "language", "head"], Annotated[float, Field(gt=0)]] = {}
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = (
        None  # rate of every lora_B over that of its lora_A
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03  # share of all steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # never on biases and norms
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0: no clipping
    betas: Annotated[tuple[_Beta, _Beta], _List] = (0.9, 0.999)


class TrainConfig(_Section):
    """How long, how often, where to."""

    epochs: Annotated[int, Field(ge=1)] = 10
    max_steps: Annotated[int, Field(ge=1)] | None = None  # optimizer steps; stops earlier than epochs would
    grad_accum_steps: Annotated[int, Field(ge=1)] | None = 4  # micro-batches per rank and optimizer step
    # Samples per optimizer step over all ranks, from which accumulation follows, in place of grad_accum_steps.
    global_batch_size: Annotated[int, Field(ge=1)] | None = None
    log_every_steps: Annotated[int, Field(ge=1)] = 10
    eval_every_steps: Annotated[int, Field(ge=1)] = 500
    checkpoint_every_steps: Annotated[int, Field(ge=1)] = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = 3  # newest ones; the best is kept beside them
    # The steps go on while a checkpoint, copied to host memory, is written behind them.
    checkpoint_async: bool = False
    resume: str = "auto"  # auto | never | a step folder
    seed: Seed = 0  # adapter initialisation and dropout
    output_dir: str = "runs/qwen2vl"
    output_shared: bool = True  # false: each node has its own output_dir; rank 0's gets all checkpoints
    # A rank that others wait for so long ends the run, with its name; NCCL's own default.
    timeout_seconds: Annotated[int, Field(ge=10)] = 600

    @model_validator(mode="before")
    @classmethod
    def _accumulation_follows(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("global_batch_size") is not None:
            return {"grad_accum_steps": None, **value}
        return value

    @model_validator(mode="after")
    def _one_batch_rule(self) -> TrainConfig:
        if self.global_batch_size is not None and self.grad_accum_steps is not None:
            raise ValueError(
                f"global_batch_size is {self.global_batch_size} and grad_accum_steps is {self.grad_accum_steps}: "
                "accumulation follows from the global batch and the number of ranks; drop one, or set it to null"
            )
        if self.global_batch_size is None and self.grad_accum_steps is None:
            raise ValueError("grad_accum_steps is null and global_batch_size too; set one of them")
        return self


class EvalConfig(_Section):
    """Captions of validation photos, generated and scored during training; off unless `every_steps` is set."""

    every_steps: Annotated[int, Field(ge=1)] | None = None  # optimizer steps; the last step too
    images: Annotated[int, Field(ge=1)] = 64  # samples: the first of data.validation
    batch_size: Annotated[int, Field(ge=1)] = 8  # samples of one rank that generate at a time
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    # METEOR is left out: its program takes longer to start than all others to score. None at all needs no Java.
    scores: Annotated[tuple[Literal["Bleu", "METEOR", "ROUGE_L", "CIDEr"], ...], _List] = (
        "Bleu",
        "ROUGE_L",
        "CIDEr",
    )
    scored: Literal["first", "whole"] = "first"  # of an answer: its first caption, or the whole text


class DeepSpeedSection(_Section):
    """Which ZeRO file, when no launcher names one."""

    config: str | None = None


class TrackingConfig(_Section):
    """Experiment trackers, through accelerate."""

    trackers: Annotated[tuple[Literal["swanlab", "tensorboard", "wandb"], ...], _List] = ("swanlab",)
    project: str = "Qwen2-VL-finetune"
    name: str | None = None
    mode: Literal["offline", "local", "online", "disabled"] = "offline"


class Recipe(_Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig | None = LoraConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, value: Any) -> Any:
        # `data:` with everything under it commented out parses as null; only `lora: null` has a meaning.
        if isinstance(value, dict):
            return {key: part for key, part in value.items() if part is not None or key == "lora"}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not self.data.train and not self.data.mixture:
            raise ValueError(
                "data.train is missing: name a folder made by `qwenvl-dist shards pack`, or several in data.mixture"
            )
        if self.data.train and self.data.mixture:
            raise ValueError(
                f"data.train is {self.data.train} and data.mixture has {len(self.data.mixture)} entries: a run takes "
                "one of the two; drop one, or empty it with `data.train=` or `data.mixture=[]`"
            )
        if self.eval.every_steps is not None and not self.data.validation:
            raise ValueError(
                f"eval.every_steps is {self.eval.every_steps}, but data.validation is missing: name the shards whose "
                "photos are to be captioned, or drop eval.every_steps"
            )
        mode = self.data.captions_mode
        conflict = None if mode is None else attention_conflict(self.model.attention, mode)
        if conflict:
            raise ValueError(conflict)
        if self.lora is None and not self.model.train:
            raise ValueError(
                "nothing would train: lora is null and model.train is empty; "
                f"name parts of {', '.join(TRAINABLE_PARTS)} in model.train, or give a lora section"
            )
        if self.lora is None and self.optim.lora_plus_ratio is not None:
            raise ValueError(
                f"optim.lora_plus_ratio is {self.optim.lora_plus_ratio:g}, but lora is null: there is no lora_B to "
                "train at another rate; drop the ratio, or give a lora section"
            )
        if self.lora is not None and "language" in self.model.train:
            raise ValueError(
                "model.train names `language` while lora is on: the adapter would train on moving base weights; "
                "write `lora: null` for full fine-tuning, or drop `language`"
            )
        return self

    def grad_accum_steps(self, world_size: int) -> int:
        """Return the micro-batches per rank and optimizer step in a world of so many ranks.

        Raises UserError when train.global_batch_size cannot be dealt to them evenly.
        """
        wanted, micro = self.train.global_batch_size, self.data.micro_batch_size
        if wanted is None:
            assert self.train.grad_accum_steps is not None, "one of the two is set"
            return self.train.grad_accum_steps
        at_once = world_size * micro
        steps, rest = divmod(wanted, at_once)
        if rest:
            near = [str(count * at_once) for count in (steps, steps + 1) if count]
            raise UserError(
                f"train.global_batch_size = {wanted}: must be a multiple of ranks x data.micro_batch_size = "
                f"{world_size} x {micro} = {at_once}; take {' or '.join(near)}, or another number of ranks or "
                "data.micro_batch_size"
            )
        return steps

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, every default filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that `load_recipe` reads back to the same recipe."""
        return yaml.dump(self.to_dict(), Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2 floats and no silent duplicate keys."""


class _RecipeDumper(yaml.SafeDumper):
    """Quotes the texts that `_RecipeLoader` would take for floats."""


# PyYAML follows YAML 1.1, where `1e-4` (no dot) is a string; YAML 1.2.2 section 10.3.2 reads it as a float.
for _side in (_RecipeLoader, _RecipeDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{origin}{line}: not valid YAML: {error.problem}; correct that line") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{origin}: not valid YAML: {reason}; correct the file") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in `tree`; the value is YAML: `null`, `3`, `1e-4`, `[a, b]` mean what they look like.

    An entry of a list goes by its number from 0 on, as in `data.mixture.0.epochs=2`.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    is_path = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(\.([A-Za-z_][A-Za-z0-9_]*|[0-9]+))*", path)
    if not equals or not is_path:
        raise UserError(
            f"override {override!r}: must look like key.path=value, for instance optim.learning_rate=2e-4"
        )
    node: Any = tree
    for key, following in itertools.pairwise(keys):
        place = _place_in(node, key, override)
        kind, wanted = ("list", list) if following.isdecimal() else ("section", dict)
        if node[place] is None:
            node[place] = wanted()
        if not isinstance(node[place], wanted):
            raise UserError(f"override {override!r}: {key!r} holds the value {node[place]!r}, not a {kind}")
        node = node[place]
    node[_place_in(node, keys[-1], override)] = _parse_yaml(text, f"override {override!r}") if text else ""


def _place_in(node: dict[str, Any] | list[Any], key: str, override: str) -> str | int:
    """Return where a section or list has what a key names; a section gets the key."""
    if isinstance(node, dict):
        node.setdefault(key)
        return key
    if int(key) >= len(node):
        held = f"entries 0 to {len(node) - 1}" if node else "no entries"
        raise UserError(f"override {override!r}: there is no entry {key}, the recipe's list has {held}")
    return int(key)


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the class of the section at a key path, None where there is none."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):  # an entry of a list, whose class the list's own annotation named
            continue
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return None
    return model


_BRANCH = re.compile(r"int|str|[a-z-]+\[.*\]|PixelRange|LoraConfig")
_RULES = {  # by pydantic's type of fault; its own words elsewhere
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text, in quotes if it looks like something else",
    "tuple_type": "must be a list, such as [a, b]",
    "model_type": "must be a section, with keys and values below it",
    "literal_error": "must be {expected}",
    "missing": "must have one more value",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def _rule_and_remedy(fault: Any, location: tuple[int | str, ...]) -> str:
    if fault["type"] == "value_error":
        return fault["msg"].removeprefix("Value error, ")  # our own words say both
    bounds = {k: f"{v:g}" if isinstance(v, float) else v for k, v in fault.get("ctx", {}).items()}
    rule = _RULES[fault["type"]].format(**bounds) if fault["type"] in _RULES else fault["msg"]
    if fault["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        near = difflib.get_close_matches(str(fault["input"]), allowed, n=1)
        if near:
            return f"{rule}; did you mean {near[0]!r}?"
    names = [part for part in location if isinstance(part, str)]
    section = _section_at(tuple(names[:-1]))
    default = section.model_fields[names[-1]].default if section else ""
    if isinstance(default, BaseModel) or default == "":
        return rule
    return f"{rule}; or leave {names[-1]} out" + (
        f" for {json.dumps(default)}" if default is not None else ""
    )


def _explain(error: ValidationError, origin: str) -> str:
    """Put the first fault into one line: key, value, rule, remedy."""
    faults = error.errors(include_url=False)
    # `image_size: int | PixelRange` reports one fault per branch; the branch that fits the value's type says most.
    vague = ("int_type", "model_type")
    fault = min(faults, key=lambda f: 0 if f["type"] == "extra_forbidden" else 1 + (f["type"] in vague))
    # pydantic names the branch of a union inside the path; the last part of an unknown key is the user's own.
    last = len(fault["loc"]) - 1 if fault["type"] == "extra_forbidden" else None
    location = tuple(
        part for number, part in enumerate(fault["loc"]) if number == last or not _BRANCH.fullmatch(str(part))
    )
    key = ".".join(map(str, location))
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        section = _section_at(location[:-1])
        allowed = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(allowed)}"
        return f"{origin}: unknown key {key!r}; {remedy}"
    message = _rule_and_remedy(fault, location)
    more = f" (and {len(faults) - 1} more)" if len({f["loc"][:2] for f in faults}) > 1 else ""
    if not key:
        return f"{origin}: {message}{more}"
    return f"{origin}: {key} = {json.dumps(fault['input'], default=str)}: {message}{more}"


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file, apply dotted overrides, validate.

    Raises UserError with one line (key, value, rule, remedy) for anything a user can mend.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"recipe {path}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    tree = _parse_yaml(text, f"recipe {path}")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(
            f"recipe {path}: holds a {type(tree).__name__}; it must be a mapping with sections such as data:"
        )
    return make_recipe(tree, f"recipe {path}", overrides)


def make_recipe(tree: dict[str, Any], origin: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Apply dotted overrides to plain values and validate them; `origin` says where they come from.

    Raises UserError with one line (key, value, rule, remedy).
    """
    for override in overrides:
        apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, origin)) from error
