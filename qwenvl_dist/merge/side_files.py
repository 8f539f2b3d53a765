"""What lies beside the weights: config, generation config, tokenizer, chat template, processor, index."""

import json
import shutil
from pathlib import Path

from qwenvl_dist.merge.write import FilePlan, output_bytes
from qwenvl_dist.model.base_folder import INDEX_FILE, BaseFolder

# By kind: of each the checkpoint's own files are taken when it has one
_TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
}  # fmt: skip
_TEMPLATE = {"chat_template.json", "chat_template.jinja"}
_IMAGES = {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}
_MODEL = {
    "config.json",
    "generation_config.json",
    "configuration.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
}


def write_side_files(
    base: BaseFolder, processor: Path | None, out: Path, dtype: str | None, files: list[FilePlan]
) -> None:
    """Put everything but weights into `out`, the processor of training before the base's."""
    own = {path.name: path for path in processor.iterdir() if path.is_file()} if processor else {}
    for kind in (_TOKENIZER, _TEMPLATE, _IMAGES, _MODEL):
        if kind is _MODEL or not own.keys() & kind:
            for name in sorted(kind):
                if (base.path / name).is_file():
                    shutil.copyfile(base.path / name, out / name)
    for name, path in own.items():
        shutil.copyfile(path, out / name)
    if dtype:
        _set_config_dtype(out / "config.json", dtype)
    if base.index is not None:
        index = json.loads((base.path / INDEX_FILE).read_text(encoding="utf-8"))
        total = sum(output_bytes(plan) for file in files for plan in file.plans)
        index.setdefault("metadata", {})["total_size"] = total
        (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _set_config_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for key in ("torch_dtype", "dtype"):
            if key in section:
                section[key] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
