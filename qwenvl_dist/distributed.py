"""Ranks: who we are, how they start, and the few words they exchange on the host side.

Everything here runs the same over gloo (no GPU) and NCCL: the backend, the device and DeepSpeed's accelerator are
chosen in `prepare_environment` and `start`, nowhere else.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.heartbeat import collective_seconds
from qwenvl_dist.launched import choose_interface, require_whole_world
from qwenvl_dist.logs import place
from qwenvl_dist.startup import StartUp

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup

    from qwenvl_dist.config import Recipe

# What the recipe decides; a DeepSpeed file that holds one of them could silently contradict it.
RECIPE_OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


@dataclass(frozen=True)
class Topology:
    """Where this process stands among all."""

    rank: int
    local_rank: int
    node: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes shared files and prints."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Topology:
        """Read what torchrun, accelerate and srun wrappers set; without a launcher this is a world of one."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            node=int(os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", 0))),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
        )


def prepare_environment() -> None:
    """Set what must stand in the environment before DeepSpeed, tokenizers and torch.distributed are imported."""
    # Deprecations inside DeepSpeed and accelerate, once per collective otherwise.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed|transformers\.modeling_utils"
    )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # accelerate drops DeepSpeed without a word when this is set.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    # Loader workers are forked; the tokenizer's thread pool does not survive that, and one thread a worker is right.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def shipped_deepspeed_config(name: str) -> Path:
    """Return the path of a file of `ds_configs/`, in a checkout or in an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "ds_configs", here / "ds_configs"):
        if (folder / name).is_file():
            return folder / name
    raise AssertionError(f"ds_configs/{name} is missing from the installation")


def read_deepspeed_file(path: str | Path) -> dict[str, Any]:
    """Return a DeepSpeed file without what the recipe decides. Raises UserError when it holds any of that."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"DeepSpeed file {path}: cannot be read ({error.strerror}); paths are relative to the working folder"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"DeepSpeed file {path}: line {error.lineno} is not JSON ({error.msg}); correct it"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UserError(
            f"DeepSpeed file {path}: has no zero_optimization section; start from ds_configs/zero2.json"
        )
    for key in RECIPE_OWNED_KEYS:
        if config.pop(key, "auto") != "auto":
            raise UserError(
                f"DeepSpeed file {path}: holds {key!r}, which the recipe decides; take it out of the file"
            )
    return config


def _refuse_whole_weight_settings(zero: dict[str, Any]) -> None:
    """Refuse what DeepSpeed makes from a whole weight while the model is built: a rank reads its own slices only."""
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError("zero_optimization.offload_param.device = nvme: must be cpu or none")
    size = zero.get("zero_hpz_partition_size", 1)
    if size != 1:
        raise UserError(f"zero_optimization.zero_hpz_partition_size = {size}: must be 1; drop the key")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            raise UserError(f"zero_optimization.{key} = true: weights cannot be quantised; drop the key")


def _check_nvme(zero: dict[str, Any]) -> None:
    """Refuse an optimizer on NVMe where DeepSpeed would fail later, or in its own words."""
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return
    if zero["stage"] != 3:
        raise UserError(
            f"zero_optimization.offload_optimizer.device = nvme with stage {zero['stage']}: needs stage 3; "
            "use cpu or none"
        )
    path = offload.get("nvme_path")
    if not path or not os.access(path, os.W_OK | os.X_OK):
        raise UserError(
            f"zero_optimization.offload_optimizer.nvme_path = {json.dumps(path)}: must be a folder on this node's "
            "NVMe disk that can be written to"
        )


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """Return the DeepSpeed configuration of this run: the ZeRO file's knobs plus what the recipe decides.

    The file is the launcher's, else the recipe's, else the shipped ZeRO-2; two that differ are a UserError.
    """
    launcher_path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    config: dict[str, Any] | None = None
    if launcher_path != "none":
        config = read_deepspeed_file(launcher_path)
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from accelerate import (
            DeepSpeedPlugin,
        )  # the launcher gave a stage and offload flags instead of a file

        launched = DeepSpeedPlugin().deepspeed_config
        config = {
            "zero_optimization": {k: v for k, v in launched["zero_optimization"].items() if v is not None}
        }
    if recipe.deepspeed.config is not None:
        own = read_deepspeed_file(recipe.deepspeed.config)
        if config is not None and own != config:
            raise UserError(
                f"deepspeed.config = {recipe.deepspeed.config}: the launcher names another configuration "
                f"({launcher_path}); drop deepspeed.config from the recipe or launch with the same file"
            )
        config = own
    if config is None:
        config = read_deepspeed_file(shipped_deepspeed_config("zero2.json"))
    stage = config["zero_optimization"].get("stage")
    if stage not in (2, 3):
        raise UserError(
            f"zero_optimization.stage = {stage}: this toolkit trains under ZeRO 2 or 3; set one of them"
        )
    _check_nvme(config["zero_optimization"])
    if stage == 3:
        _refuse_whole_weight_settings(config["zero_optimization"])
    config["train_micro_batch_size_per_gpu"] = recipe.data.micro_batch_size
    config["gradient_accumulation_steps"] = recipe.grad_accum_steps(Topology.from_environment().world_size)
    config["gradient_clipping"] = recipe.optim.max_grad_norm
    return config


_M_MMAP_THRESHOLD = -3  # <malloc.h>


def return_freed_memory() -> None:
    """Make glibc give large freed blocks back to the system; does nothing with another C library.

    Under ZeRO-3 without a GPU whole weights come and go in host memory. glibc takes the first that is freed for a sign
    that such blocks had better stay in the heap, which then grows and fragments from step to step. A limit that is set
    stays as it is (mallopt(3)). torch then asks for huge pages, with which a fresh block costs a quarter of the time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch first allocates
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def bound_groups(timeout: timedelta) -> None:
    """Let every process group that is made from now on without a time-out of its own have this one.

    DeepSpeed clones the world for its collectives and names none: over gloo they would wait for 30 minutes, over NCCL
    for 10, whatever the world itself was given. Making a group is bounded too.
    """
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # what new_group reads
        assert hasattr(distributed_c10d, name), f"torch.distributed has no {name} any more"
        setattr(distributed_c10d, name, timeout)


def start(recipe: Recipe, startup: StartUp | None = None) -> Accelerator:
    """Join the other ranks and return accelerate's handle, with DeepSpeed on; marks its parts. Collective.

    Raises UserError when the world that formed is not the one that was launched: a rank that silently trains alone is
    the worst failure of all. Raises CheckFailed when ranks do not come within the time-out.
    """
    startup = startup or StartUp()
    require_whole_world()
    choose_interface()
    config = deepspeed_config(recipe)
    prepare_environment()
    import deepspeed  # noqa: F401  (accelerate would import it while it joins)
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

    startup.mark("imports")
    if config["zero_optimization"]["stage"] == 3 and not torch.cuda.is_available():
        return_freed_memory()
    topology = Topology.from_environment()
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=config["zero_optimization"]["stage"] == 3)
    # Without the explicit backend accelerate believes in a world of one on every rank of a machine without GPUs.
    timeout = timedelta(seconds=collective_seconds(recipe.train.timeout_seconds))
    process_group = InitProcessGroupKwargs(
        backend="nccl" if torch.cuda.is_available() else "gloo", timeout=timeout
    )
    bound_groups(timeout)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if recipe.model.dtype == "bfloat16" else "no",
            gradient_accumulation_steps=config["gradient_accumulation_steps"],
            deepspeed_plugin=plugin,
            kwargs_handlers=[process_group],
            step_scheduler_with_optimizer=False,
            log_with=list(recipe.tracking.trackers) if recipe.tracking.mode != "disabled" else None,
            project_config=ProjectConfiguration(
                project_dir=recipe.train.output_dir, logging_dir=f"{recipe.train.output_dir}/tensorboard"
            ),
        )
    except torch.distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise CheckFailed(
            f"{place()} of {topology.world_size} did not meet the other ranks at {address} within "
            f"{timeout.total_seconds():.0f} s ({str(error).splitlines()[0]}); look at the first error of the other "
            "nodes, and whether each of them was started and reaches that address"
        ) from error
    formed = (accelerator.num_processes, torch.distributed.get_world_size())
    if (
        formed != (topology.world_size, topology.world_size)
        or accelerator.distributed_type != DistributedType.DEEPSPEED
    ):
        raise UserError(
            f"launched as rank {topology.rank} of {topology.world_size}, but accelerate sees {formed[0]} processes, "
            f"torch {formed[1]}, type {accelerator.distributed_type}; launch with a file of launch/accelerate/"
        )
    startup.mark("join")
    return accelerator


@contextmanager
def host_ranks_or_one(timeout_seconds: float) -> Iterator[HostGroup | OneRank]:
    """Join the other ranks where a launcher started some, as `host_ranks` does. Collective."""
    topology = Topology.from_environment()
    if topology.world_size == 1:
        require_whole_world()
        yield OneRank()
        return
    with host_ranks(timeout_seconds) as host:
        yield host


@contextmanager
def host_ranks(timeout_seconds: float) -> Iterator[HostGroup]:
    """Join the other ranks without DeepSpeed, for work that is only shared out, and part again. Collective."""
    require_whole_world()
    prepare_environment()
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield HostGroup(timeout_seconds)
    finally:
        dist.destroy_process_group()


class OneRank:
    """A HostGroup of nobody else, for which no process group is needed."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]


class HostGroup:
    """Sums, gathers and broadcasts of small host-side values over all ranks.

    A gloo group of its own, so that agreeing on a count or a stop signal never waits for a GPU.
    All methods but `send` and `receive` are collective; one thread at a time may call them.
    """

    def __init__(self, timeout_seconds: float) -> None:
        import torch.distributed as dist

        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        assert not isinstance(group, int), "every rank is a member"
        self._group: ProcessGroup = group
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()

    def sum(self, *values: int) -> tuple[int, ...]:
        """Return each value summed over ranks."""
        return tuple(int(v) for v in self._reduce(values, "SUM"))

    def max(self, *values: float) -> tuple[float, ...]:
        """Return the largest of each value over ranks."""
        return tuple(self._reduce(values, "MAX"))

    def _reduce(self, values: tuple[float, ...], operation: str) -> list[float]:
        import torch
        import torch.distributed as dist

        integers = all(isinstance(v, int) for v in values)
        tensor = torch.tensor(values, dtype=torch.int64 if integers else torch.float64)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation), group=self._group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's (picklable) value, in rank order, on every rank."""
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def from_main(self, value: Any) -> Any:
        """Return rank 0's (picklable) value on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def send(self, data: bytes | bytearray, to: int) -> None:
        """Send bytes to one rank, which must `receive` them."""
        import torch
        import torch.distributed as dist

        dist.send(torch.tensor([len(data)]), to, group=self._group)
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to, group=self._group)

    def receive(self, sender: int) -> bytes:
        """Return the bytes that one rank sends."""
        import torch
        import torch.distributed as dist

        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, sender, group=self._group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if data.numel():
            dist.recv(data, sender, group=self._group)
        return data.numpy().tobytes()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0)
