"""Find a checkpoint and say what training left in it: LoRA deltas, and parameters trained as a whole."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_dist.checkpoints.manifest import MANIFEST, InvalidCheckpoint, verify
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint, is_zero_checkpoint
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.files import file_state
from qwenvl_dist.merge.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraConfig,
    LoraDelta,
    TrainedParameter,
    pair_up,
    read_config,
    read_peft_folder,
    split_name,
)
from qwenvl_dist.merge.parallel import one_thread
from qwenvl_dist.model.names import SAVED_COPY, runtime_name

_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Trained:
    """What a merge puts into the base, by run-time name."""

    source: Path  # the folder it came from
    deltas: dict[str, LoraDelta] = field(default_factory=dict)  # by module
    parameters: dict[str, TrainedParameter] = field(default_factory=dict)  # by tensor
    adapter_config: dict[str, Any] | None = None
    base_fingerprint: str | None = None  # of the base it was trained on, when the checkpoint says
    processor: Path | None = None  # its tokenizer and image settings

    def fingerprint(self) -> str:
        """Return a sha256 over what a merge takes from here.

        The adapter counts whole; of parameters trained as a whole, which may be as large as the base, the middle 4 KiB,
        with the manifest's hashes or else the state of each file.
        """
        digest = hashlib.sha256(json.dumps(self.adapter_config, sort_keys=True).encode())
        for module, delta in sorted(self.deltas.items()):
            digest.update(f"\0{module}\0{delta.scaling}".encode())
            for tensor in delta.tensors().values():
                digest.update(tensor.contiguous().numpy().data)
        for name, parameter in sorted(self.parameters.items()):
            size = math.prod(parameter.shape)
            count = min(size, 1024)
            digest.update(f"\0{name}\0{parameter.shape}".encode())
            digest.update(parameter.elements((size - count) // 2, count).numpy().data)
        if (self.source / MANIFEST).is_file():
            digest.update((self.source / MANIFEST).read_bytes())
        else:
            digest.update(repr([file_state(path) for path in sorted(self.source.rglob("*"))]).encode())
        return digest.hexdigest()


def find_checkpoint(path: Path) -> Path:
    """Return the step or adapter folder that a path means: itself, or a run's best, else newest, one."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; name a step folder, a run folder or a peft adapter folder")
    if (path / MANIFEST).is_file() or (path / ADAPTER_CONFIG).is_file() or is_zero_checkpoint(path):
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (checkpoints / "best").is_dir():
        return (checkpoints / "best").resolve()
    steps = {
        int(match[1]): folder
        for folder in checkpoints.iterdir()
        if (match := _STEP_FOLDER.fullmatch(folder.name)) and (folder / MANIFEST).is_file()
    }
    if not steps:
        raise UserError(
            f"{path} holds no finished checkpoint (checkpoints/step-*/{MANIFEST}), no ZeRO partitions and no "
            f"{ADAPTER_CONFIG}; name a step folder, a run folder or a peft adapter folder"
        )
    return steps[max(steps)]


@one_thread()
def read_trained(folder: Path) -> Trained:
    """Read a step folder, a plain DeepSpeed folder or a peft adapter.

    Raises:
        UserError: see `pair_up`, `ZeroCheckpoint`; or adapter tensors without a config to scale them by.
    """
    processor = folder / "processor"
    manifest = _read_manifest(folder)
    common: dict[str, Any] = {
        "source": folder,
        "base_fingerprint": (manifest.get("base") or {}).get("fingerprint"),
        "processor": processor if processor.is_dir() else None,
    }
    if not is_zero_checkpoint(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"{folder} holds neither ZeRO partitions nor {ADAPTER_WEIGHTS}")
        deltas, saved = read_peft_folder(folder)
        return Trained(deltas=deltas, parameters=saved, adapter_config=read_config(folder), **common)

    checkpoint = ZeroCheckpoint(folder)
    adapter_names = [name for name in checkpoint.shapes if split_name(name)]
    parameters: dict[str, TrainedParameter] = {}
    for name in checkpoint.shapes:
        if split_name(name):
            continue
        if runtime_name(name) in parameters:
            raise UserError(f"{folder}: {name} was trained under two names")
        parameters[runtime_name(name)] = TrainedParameter(
            tuple(checkpoint.shapes[name]), partial(checkpoint.fp32_elements, name), SAVED_COPY in name
        )
    config = read_config(folder) or read_config(checkpoint.folder.parent)
    if not adapter_names:
        if config:
            raise UserError(f"{folder} has an adapter config but its partitions hold no adapter tensor")
        return Trained(parameters=parameters, **common)
    if not config:
        raise UserError(
            f"{folder} holds an adapter but no {ADAPTER_CONFIG}, without which its scaling is not known; "
            "put the one that peft wrote beside the partitions"
        )
    deltas = pair_up(
        {name: checkpoint.fp32(name) for name in adapter_names}, LoraConfig(config, folder), folder
    )
    return Trained(deltas=deltas, parameters=parameters, adapter_config=config, **common)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return it; a folder of DeepSpeed's own has none."""
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        return verify(folder)
    except InvalidCheckpoint as error:
        raise CheckFailed(f"{folder} is damaged: {error}; merge another checkpoint of the run") from error
