"""One COCO captions file and its pictures, written anew in every other format that `shards pack` reads."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "COCO Yes:"
Pairs = list[tuple[str, list[str]]]  # file name and captions, by image id


def pairs_of(captions: Path) -> Pairs:
    content = json.loads(captions.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    texts: dict[int, list[str]] = {image_id: [] for image_id in sorted(names)}
    for annotation in content["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    return [(names[image_id], texts[image_id]) for image_id in texts]


def write_csv(pairs: Pairs, images: Path, folder: Path) -> Path:
    """As the article does, by relative path; pandas quotes what needs quotes."""
    path = folder / "captions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "caption"])
        writer.writerows([f"coco_2014_caption/{name}", "&&".join(texts)] for name, texts in pairs)
    return path


def _json_array(make: Callable[[str, str, Path], dict[str, Any]]) -> Callable[[Pairs, Path, Path], Path]:
    def write(pairs: Pairs, images: Path, folder: Path) -> Path:
        path = folder / "data.json"
        records = [make(name, "&&".join(texts), images) for name, texts in pairs]
        path.write_text(json.dumps(records, indent=2))
        return path

    return write


def _json_lines(make: Callable[[str, str, Path], dict[str, Any]]) -> Callable[[Pairs, Path, Path], Path]:
    def write(pairs: Pairs, images: Path, folder: Path) -> Path:
        path = folder / "data.jsonl"
        lines = [json.dumps(make(name, "&&".join(texts), images)) for name, texts in pairs]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def article(name: str, text: str, images: Path) -> dict[str, Any]:
    said = [("user", f"{PROMPT} <|vision_start|>{images / name}<|vision_end|>"), ("assistant", text)]
    turns = [{"from": role, "value": value} for role, value in said]
    return {"id": Path(name).stem, "conversations": turns}


def qwen(name: str, text: str, images: Path) -> dict[str, Any]:
    parts = [{"type": "image", "image": f"file://{images / name}"}, {"type": "text", "text": PROMPT}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": text}]}


def openai(name: str, text: str, images: Path) -> dict[str, Any]:
    url = {"type": "image_url", "image_url": {"url": str(images / name)}}
    user = {"role": "user", "content": [{"type": "text", "text": PROMPT}, url]}
    return {
        "messages": [user, {"role": "assistant", "content": [{"type": "text", "text": text}]}],
        "id": Path(name).stem,
    }


def swift(name: str, text: str, images: Path) -> dict[str, Any]:
    user = {"role": "user", "content": f"<image>{PROMPT}"}
    return {"messages": [user, {"role": "assistant", "content": text}], "images": [name]}


def sharegpt(name: str, text: str, images: Path) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>{PROMPT}"}, {"from": "gpt", "value": text}]
    return {"conversations": turns, "images": [name]}


def llava(name: str, text: str, images: Path) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{PROMPT}"}, {"from": "gpt", "value": text}]
    return {"id": Path(name).stem, "image": f"elsewhere/{name}", "conversations": turns}


def _dataset(pairs: Pairs, images: Path) -> Any:
    import datasets

    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    columns = {"image": [str(images / name) for name, _ in pairs], "captions": [texts for _, texts in pairs]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(pairs: Pairs, images: Path, folder: Path) -> Path:
    """A data set that names its pictures by path."""
    _dataset(pairs, images).save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(pairs: Pairs, images: Path, folder: Path) -> Path:
    """As the hub holds it: the pictures inside, in two files of several row groups."""
    (folder / "data").mkdir()
    dataset = _dataset(pairs, images)
    for number in range(2):
        path = folder / "data" / f"train-0000{number}-of-00002.parquet"
        dataset.shard(2, number, contiguous=True).to_parquet(path, batch_size=50)
    return folder


# Name: (--source, what writes it). All are read with --images.
FILES: dict[str, tuple[str, Callable[[Pairs, Path, Path], Path]]] = {
    "csv": ("csv", write_csv),
    "article": ("conversations", _json_array(article)),
    "qwen": ("messages", _json_lines(qwen)),
    "openai": ("messages", _json_lines(openai)),
    "swift": ("messages", _json_lines(swift)),
    "sharegpt": ("messages", _json_array(sharegpt)),
    "llava": ("llava", _json_array(llava)),
    "saved": ("huggingface", saved),
    "parquet": ("huggingface", parquet),
}


def write_webdataset(pairs: Pairs, images: Path, folder: Path) -> None:
    """jpg + txt, as plain `tar` writes it, 100 samples a shard."""
    for number in range(0, len(pairs), 100):
        with tarfile.open(folder / f"{number // 100:05d}.tar", "w") as archive:
            for name, texts in pairs[number : number + 100]:
                archive.add(images / name, name)
                info = tarfile.TarInfo(f"{Path(name).stem}.txt")
                data = "&&".join(texts).encode()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
