"""ZeRO-3 loading in which no rank ever holds a weight: each reads its own slices from the safetensors files.

DeepSpeed keeps of a parameter of n elements `ceil(n / world)` a rank, of the flat row-major tensor. In a safetensors
file that is one range of bytes.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor, nn

from qwenvl_dist.errors import UserError
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.base_folder import BaseFolder, TensorEntry, refuse_keys
from qwenvl_dist.model.names import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

log = get_logger(__name__)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 1 << 24


class _EmptyPartitions(partition_parameters.Init):
    """DeepSpeed's construction of a partitioned model, without values: nothing is initialised, broadcast or copied.

    Weights are made on the device but never touched: that costs no memory on a CPU, one weight at a time on a GPU.
    """

    def _post_init_method(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if not partition_parameters.is_zero_param(parameter):
                self._partition_without_values(parameter)
        super()._post_init_method(module)  # the buffers; it skips parameters that are partitioned

    def _partition_without_values(self, parameter: Any) -> None:
        self._convert_to_deepspeed_param(parameter)
        world = parameter.ds_zero_partition_world_size
        size = -(-parameter.ds_numel // world)
        own: Any = torch.empty(size, dtype=parameter.dtype, device=self.remote_device)
        if self.pin_memory:  # which DeepSpeed leaves off unless the weights are offloaded to the host
            accelerator: Any = get_accelerator()
            own = accelerator.pin_memory(own)
        own.ds_numel = size
        own.status = partition_parameters.PartitionedParamStatus.AVAILABLE
        own.final_location = None
        parameter.ds_tensor = own
        parameter.ds_numel_aligned = size * world
        parameter.partition()  # with a slice in place this frees the whole


def load_partitioned(folder: Path, dtype: torch.dtype, attention: str) -> Qwen2VLForCaptionLoss:
    """Build the model partitioned and fill this rank's slices. Collective only in that every rank has to do it.

    Raises UserError when the files do not hold exactly the model's tensors.
    """
    began = time.perf_counter()
    base = BaseFolder(folder)
    model = _build(folder, dtype, attention)
    parameters: dict[str, Any] = dict(model.named_parameters())
    _check(base, parameters)
    nbytes = 0
    with _Reader(base) as reader:
        for name, parameter in parameters.items():
            entry = base.tensors[base.by_runtime_name[name]]
            nbytes += reader.fill(entry, parameter.ds_tensor, parameter.ds_zero_partition_rank)
        if LM_HEAD not in parameters and LM_HEAD in base.by_runtime_name:
            nbytes += _check_tied_head(base, reader, parameters[EMBEDDING])
    seconds = time.perf_counter() - began
    log.info(
        "read %.2f of %.2f GiB of weights, this rank's slices, in %.1f s",
        nbytes / 2**30, base.nbytes / 2**30, seconds,
    )  # fmt: skip
    return model


def _build(folder: Path, dtype: torch.dtype, attention: str) -> Qwen2VLForCaptionLoss:
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import deepspeed_config, prevent_arange_dtype_change
    from transformers.modeling_utils import set_zero3_state
    from transformers.utils import GENERATION_CONFIG_NAME

    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

    config_class: Any = Qwen2VLForCaptionLoss.config_class
    config = config_class.from_pretrained(folder)
    with ExitStack() as stack:
        stack.enter_context(no_init_weights())
        stack.enter_context(prevent_arange_dtype_change())  # before Init, which would make positions bf16
        stack.enter_context(_EmptyPartitions(config_dict_or_path=deepspeed_config()))
        stack.enter_context(set_zero3_state())  # or transformers would open an Init of its own
        model = Qwen2VLForCaptionLoss._from_config(config, dtype=dtype, attn_implementation=attention)
    assert model.dtype == dtype, f"DeepSpeed's configuration made it {model.dtype}, not {dtype}"
    model.tie_weights()
    if (folder / GENERATION_CONFIG_NAME).is_file():  # where answers end, as from_pretrained reads it
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _check(base: BaseFolder, parameters: dict[str, Any]) -> None:
    """Raise UserError unless the files hold the model's tensors, all of them, no others, in these shapes."""
    stored = base.by_runtime_name
    tied = {LM_HEAD} - parameters.keys()
    refuse_keys("missing", parameters.keys() - stored.keys())
    both = stored.keys() & parameters.keys()
    shapes = {name: base.tensors[stored[name]].shape for name in both}
    refuse_keys("mismatched", [n for n, shape in shapes.items() if shape != tuple(parameters[n].ds_shape)])
    refuse_keys("unexpected", stored.keys() - both - tied)


def _check_tied_head(base: BaseFolder, reader: _Reader, embedding: Any) -> int:
    """Raise UserError when the files hold a head of its own although the config ties it; return the bytes read."""
    head = torch.empty_like(embedding.ds_tensor)
    rank = embedding.ds_zero_partition_rank
    nbytes = reader.fill(base.tensors[base.by_runtime_name[LM_HEAD]], head, rank)
    if not torch.equal(head, embedding.ds_tensor):
        raise UserError(f"config.json ties {LM_HEAD} to the embedding, but they differ in its weights")
    return nbytes


class _Reader:
    """Fills slices from a base's files through one small buffer."""

    def __init__(self, base: BaseFolder) -> None:
        self._base = base
        self._stack = ExitStack()
        self._descriptors: dict[str, int] = {}
        self._buffer = bytearray(_BLOCK_BYTES)

    def __enter__(self) -> _Reader:
        for name in self._base.files:
            file = self._stack.enter_context((self._base.path / name).open("rb", buffering=0))
            self._descriptors[name] = file.fileno()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fill(self, entry: TensorEntry, into: Tensor, number: int) -> int:
        """Write elements [number * n, (number + 1) * n) of a tensor into the n of `into`, zeros past its end.

        Returns the bytes read.
        """
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"a tensor of type {entry.dtype} in {entry.file}; must be one of {', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[entry.dtype]
        start = min(entry.begin + number * into.numel() * dtype.itemsize, entry.end)
        end = min(start + into.numel() * dtype.itemsize, entry.end)
        done = 0
        for begin in range(start, end, _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, end - begin)
            self._read(entry.file, begin, count)
            block = torch.frombuffer(self._buffer, dtype=dtype, count=count // dtype.itemsize)
            into[done : done + len(block)].copy_(block)
            done += len(block)
        into[done:].zero_()
        return end - start

    def _read(self, file: str, begin: int, count: int) -> None:
        view = memoryview(self._buffer)[:count]
        while view:
            got = os.preadv(self._descriptors[file], [view], begin)
            if not got:
                raise UserError(f"{file} ends at byte {begin}: it was cut off while it was read")
            view, begin = view[got:], begin + got
