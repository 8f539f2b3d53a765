"""Read the ZeRO partitions of a DeepSpeed checkpoint by parameter name, without DeepSpeed and without ranks.

The layout, as DeepSpeed 0.19 writes it (runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py,
runtime/bf16_optimizer.py; the same knowledge is in its utils/zero_to_fp32.py):

- Stages 1 and 2 lay the parameters of an optimizer group one after the other (each followed by its alignment
  padding, if any), pad the whole to a multiple of 2 * world size and give each rank one equal slice. A rank's
  masters are stored without the padding at the group's end, its Adam moments with it.
- Stage 3 cuts every parameter into world size pieces of ceil(numel / world size) elements; the last ones may
  hold arbitrary padding, NaN included. A rank lays its pieces of a sub-group one after the other.

So each parameter is a list of slices of the ranks' flat tensors, and reading one reads those slices alone.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenvl_dist.checkpoints import swap_files
from qwenvl_dist.checkpoints.torch_file import StoredTensor, UnreadableCheckpoint, load_torch_file

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class _Piece:
    """`count` elements from `start` on in the flat tensor of `group` on `rank`."""

    rank: int
    group: int
    start: int
    count: int


class ZeroCheckpoint:
    """The trained parameters of a ZeRO-1, 2 or 3 checkpoint of any world size, whole and by name.

    Opening reads the ranks' descriptions only; each call reads the slices it needs.

    Args:
        folder: a folder with a `latest` file, or the folder of the partitions itself.

    Raises:
        UnreadableCheckpoint: files missing, damaged or unsafe, or a layout that is not supported; says which.
    """

    stage: int
    world_size: int
    shapes: dict[str, torch.Size]  # trainable parameters, in the optimizer's order
    shared: dict[str, str]  # tied name -> the name in `shapes` that holds the data

    def __init__(self, folder: Path | str) -> None:
        self.folder = partition_folder(Path(folder))
        optimizer_files, model_file = _find_files(self.folder)
        model = _mapping(load_torch_file(model_file), model_file)
        files = [_mapping(load_torch_file(path), path) for path in optimizer_files]
        ranks = [
            _mapping(file.get("optimizer_state_dict"), path)
            for file, path in zip(files, optimizer_files, strict=True)
        ]
        _refuse_unsupported(self.folder, model, files[0])

        self.world_size = len(ranks)
        self.stage = _stage(ranks[0], optimizer_files[0])
        for state, path in zip(ranks, optimizer_files, strict=True):
            counts = state.get("partition_count")
            counts = counts if isinstance(counts, list) else [counts]
            if any(count != self.world_size for count in counts):
                raise UnreadableCheckpoint(
                    f"{path} belongs to {counts[0]} ranks, {self.folder} holds files of {self.world_size}: "
                    "files are missing or left over from another run"
                )
            if _stage(state, path) != self.stage:
                raise UnreadableCheckpoint(
                    f"{path} is of ZeRO stage {_stage(state, path)}, rank 0's of {self.stage}"
                )

        groups = model.get("param_shapes")
        if not isinstance(groups, list):
            raise UnreadableCheckpoint(f"{model_file} has no param_shapes: it was not saved with ZeRO")
        self.shapes = {name: torch.Size(shape) for group in groups for name, shape in group.items()}
        self.shared = dict(model.get("shared_params") or {})
        if not self.shapes or len(self.shapes) != sum(map(len, groups)):
            raise UnreadableCheckpoint(f"{model_file} names no trainable parameter, or one of them twice")

        masters_key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        adam_key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        self._masters: list[list[StoredTensor]] = [
            _tensors(state, masters_key, self.folder) for state in ranks
        ]
        self._adam: list[list[dict[str, Any]]] = [
            _adam_states(state.get(adam_key), len(groups)) for state in ranks
        ]
        self._adam_groups = [_adam_group_options(state.get(adam_key)) for state in ranks]
        if (self.folder / swap_files.FOLDER).is_dir():
            self._fill_in_swapped(groups)
        for rank, masters in enumerate(self._masters):
            if len(masters) != len(groups):
                raise UnreadableCheckpoint(
                    f"{optimizer_files[rank]} has {len(masters)} groups of masters, {len(groups)} are due"
                )

        self._pieces: dict[str, list[_Piece]] = {}
        for index, group in enumerate(groups):
            shapes = {name: torch.Size(shape) for name, shape in group.items()}
            if self.stage == 3:
                self._place_by_parameter(index, shapes)
            else:
                paddings = ranks[0].get("param_alignment_paddings")
                self._place_by_group(index, shapes, paddings[index] if paddings else [0] * len(shapes))

    def _fill_in_swapped(self, groups: list[dict[str, torch.Size]]) -> None:
        """The optimizer was on NVMe when DeepSpeed itself wrote the checkpoint."""
        if self.stage != 3 or len(self._adam_groups[0]) > 1:
            raise UnreadableCheckpoint(
                f"{self.folder / swap_files.FOLDER}: swap files of several parameter groups cannot be told apart; "
                "train with offload_optimizer.device cpu, or let this toolkit write the checkpoint"
            )
        sizes = [
            sum(math.ceil(torch.Size(shape).numel() / self.world_size) for shape in group.values())
            for group in groups
        ]
        for rank in range(self.world_size):
            swap_files.fill_in(self.folder, rank, sizes, self._masters[rank], self._adam[rank])

    def fp32(self, name: str) -> torch.Tensor:
        """Return the float32 master weights of a parameter."""
        return self._gather(name, self._masters).to(torch.float32).reshape(self.shapes[name])

    def fp32_elements(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return `count` elements from `start` on of the flattened masters: big tensors, bounded memory."""
        return self._gather(name, self._masters, start, count).to(torch.float32)

    def optimizer_state(self, name: str, key: str) -> torch.Tensor:
        """Return a moment of Adam, `exp_avg` or `exp_avg_sq`, whole; zeros before the first step."""
        if key not in ("exp_avg", "exp_avg_sq"):
            raise KeyError(key)
        group = self._pieces[name][0].group
        if not any(states[group] for states in self._adam):
            return torch.zeros(self.shapes[name])
        moments: list[list[StoredTensor]] = []
        for rank, states in enumerate(self._adam):
            moment = states[group].get(key)
            if not isinstance(moment, StoredTensor):
                raise UnreadableCheckpoint(
                    f"{self.folder}: rank {rank} has no {key} for {name}: not Adam, or offloaded"
                )
            moments.append([moment] * (group + 1))
        return self._gather(name, moments).reshape(self.shapes[name])

    def optimizer_step(self, name: str) -> int:
        """Return how many steps Adam has made on a parameter (bias correction counts these)."""
        steps = set()
        for piece in self._pieces[name]:
            state = self._adam[piece.rank][piece.group]
            options = self._adam_groups[piece.rank]
            step = state.get(
                "step", options[min(piece.group, len(options) - 1)].get("step", 0) if options else 0
            )
            steps.add(int(step.item() if isinstance(step, StoredTensor) else step))
        if len(steps) != 1:
            raise UnreadableCheckpoint(
                f"{self.folder}: the ranks disagree on the step of {name}: {sorted(steps)}"
            )
        return steps.pop()

    def _gather(
        self, name: str, flat: list[list[StoredTensor]], start: int = 0, count: int | None = None
    ) -> torch.Tensor:
        """Read `count` elements from `start` on."""
        end = self.shapes[name].numel() if count is None else start + count
        parts, offset = [], 0
        for piece in self._pieces[name]:
            first, last = max(start - offset, 0), min(end - offset, piece.count)
            if first < last:
                parts.append(flat[piece.rank][piece.group].read(piece.start + first, last - first))
            offset += piece.count
        return torch.cat(parts)

    def _place_by_group(self, group: int, shapes: dict[str, torch.Size], paddings: list[int]) -> None:
        """Stages 1 and 2: one flat vector a group, cut into equal slices."""
        if len(paddings) != len(shapes):
            raise UnreadableCheckpoint(
                f"{self.folder}: {len(paddings)} alignment paddings, {len(shapes)} parameters"
            )
        used = sum(shape.numel() for shape in shapes.values()) + sum(paddings)
        alignment = 2 * self.world_size
        per_rank = math.ceil(used / alignment) * alignment // self.world_size
        for rank in range(self.world_size):
            unpadded = min(max(used - rank * per_rank, 0), per_rank)
            self._check_sizes(rank, group, allowed=(unpadded, per_rank))

        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            end = offset + shape.numel()
            self._pieces[name] = [
                _Piece(rank, group, begin - rank * per_rank, min(end, (rank + 1) * per_rank) - begin)
                for rank in range(offset // per_rank, math.ceil(end / per_rank))
                for begin in [max(offset, rank * per_rank)]
            ]
            offset = end + padding

    def _place_by_parameter(self, group: int, shapes: dict[str, torch.Size]) -> None:
        """Stage 3: every parameter cut into equal pieces, the ranks' pieces laid one after the other."""
        offset = 0
        for name, shape in shapes.items():
            piece = math.ceil(shape.numel() / self.world_size)
            self._pieces[name] = [
                _Piece(rank, group, offset, min(max(shape.numel() - rank * piece, 0), piece))
                for rank in range(self.world_size)
            ]
            offset += piece
        for rank in range(self.world_size):
            self._check_sizes(rank, group, allowed=(offset,))

    def _check_sizes(self, rank: int, group: int, allowed: tuple[int, ...]) -> None:
        state = self._adam[rank][group]
        moments = [
            state[key] for key in ("exp_avg", "exp_avg_sq") if isinstance(state.get(key), StoredTensor)
        ]
        for tensor in [self._masters[rank][group], *moments]:
            if tensor.numel not in allowed:
                raise UnreadableCheckpoint(
                    f"{tensor.path}: group {group} has {tensor.numel} elements, "
                    f"{' or '.join(map(str, sorted(set(allowed))))} are due for {self.world_size} ranks"
                )


def partition_folder(folder: Path) -> Path:
    """Return the folder that holds the partitions: the one `latest` names, or `folder` itself."""
    if not folder.is_dir():
        raise UnreadableCheckpoint(f"{folder} is not a folder")
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    tag = latest.read_text(encoding="utf-8").strip()
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        raise UnreadableCheckpoint(f"{latest} names {tag!r}, which is not a folder beside it")
    return folder / tag


def is_zero_checkpoint(folder: Path) -> bool:
    """Tell whether partitions of an optimizer lie in `folder` or in the folder its `latest` names."""
    try:
        names = [path.name for path in partition_folder(folder).iterdir()]
    except UnreadableCheckpoint:
        return False
    return any(_OPTIMIZER_FILE.fullmatch(name) for name in names)


def _find_files(folder: Path) -> tuple[list[Path], Path]:
    """Return the ranks' optimizer files in rank order and rank 0's model file."""
    optimizer: dict[int, Path] = {}
    model: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if "expert" in path.name or path.name.startswith("layer_"):
            raise UnreadableCheckpoint(f"{path}: experts and pipeline stages are not supported")
        for pattern, found in ((_OPTIMIZER_FILE, optimizer), (_MODEL_FILE, model)):
            match = pattern.fullmatch(path.name)
            if not match:
                continue
            if int(match[2]) != 0:
                raise UnreadableCheckpoint(f"{path}: tensor parallel checkpoints are not supported")
            rank = int(match[1] or 0)
            if rank in found:
                raise UnreadableCheckpoint(
                    f"{path} and {found[rank].name} both claim rank {rank}: one is left over"
                )
            found[rank] = path
    if not optimizer:
        raise UnreadableCheckpoint(
            f"{folder} holds no ZeRO partitions (*zero_pp_rank_N_mp_rank_00_optim_states.pt)"
        )
    if 0 not in model:
        raise UnreadableCheckpoint(f"{folder} has no model_states.pt of rank 0")
    missing = [rank for rank in range(max(optimizer) + 1) if rank not in optimizer]
    if missing:
        raise UnreadableCheckpoint(
            f"{folder} lacks the optimizer files of ranks {missing}: a rank's save was lost"
        )
    return [optimizer[rank] for rank in sorted(optimizer)], model[0]


def _refuse_unsupported(folder: Path, model: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    config = file.get("ds_config") or model.get("ds_config")
    zero = config.get("zero_optimization", {}) if isinstance(config, Mapping) else {}
    reasons = {
        "tensor parallelism": (model.get("mp_world_size") or 1) > 1,
        "expert parallelism": bool(model.get("autoep_layers") or model.get("ds_autoep_layers")),
        "hpZ (zero_hpz_partition_size)": (zero.get("zero_hpz_partition_size") or 1) > 1,
        "MiCS (mics_shard_size)": (zero.get("mics_shard_size") or -1) > 0,
        "quantised weights": bool(
            zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights")
        ),
    }
    for reason, present in reasons.items():
        if present:
            raise UnreadableCheckpoint(f"{folder} was saved with {reason}, which is not supported")


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnreadableCheckpoint(f"{path} does not hold what DeepSpeed saves")
    return value


def _stage(state: Mapping[str, Any], path: Path) -> int:
    # DeepSpeed's BF16_Optimizer (stage 1, bf16 with fp32 accumulation) lays out as stage 1 and names no stage
    default = 1 if "single_partition_of_fp32_groups" in state else 0
    stage = int(state.get("zero_stage", default))
    if stage not in (1, 2, 3):
        raise UnreadableCheckpoint(f"{path} is of ZeRO stage {stage}; stages 1, 2 and 3 are understood")
    return stage


def _tensors(state: Mapping[str, Any], key: str, folder: Path) -> list[StoredTensor]:
    tensors = state.get(key)
    if not isinstance(tensors, list) or not all(isinstance(tensor, StoredTensor) for tensor in tensors):
        raise UnreadableCheckpoint(f"{folder} has no master weights ({key})")
    return tensors


def _adam_states(saved: Any, num_groups: int) -> list[dict[str, Any]]:
    """Return each group's state: DeepSpeed gives the base optimizer one flat parameter a group."""
    if isinstance(saved, list):  # elastic checkpoints list the states alone
        return [dict(state) for state in saved]
    states = saved.get("state", {}) if isinstance(saved, Mapping) else {}
    return [dict(states.get(group, {})) for group in range(num_groups)]


def _adam_group_options(saved: Any) -> list[Mapping[str, Any]]:
    """Return the options of the optimizer's parameter groups; fused Adam keeps its step there."""
    return list(saved.get("param_groups", [])) if isinstance(saved, Mapping) else []
