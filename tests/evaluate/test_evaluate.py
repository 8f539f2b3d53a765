import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.formats import ImageRef, Sample, caption_messages
from qwenvl_dist.data.index import Manifest, load_shard_index
from qwenvl_dist.data.pack import pack
from qwenvl_dist.evaluate.compare import exact_match
from qwenvl_dist.evaluate.generate import load_captioner
from qwenvl_dist.evaluate.run import ShardEvaluation, evaluate

PROMPT = "COCO Yes:"
SHORT = ("--max-new-tokens", "8", "--batch-size", "4")


def library_loss(model: Any, base: Path, pictures: list[Path], references: list[str]) -> float:
    """Return the mean over all answer tokens, one sample at a time through the hub processor."""
    processor: Any = AutoProcessor.from_pretrained(base)
    total, tokens = 0.0, 0
    for picture, reference in zip(pictures, references, strict=True):
        messages = caption_messages(PROMPT, reference)
        prompt = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        images = [Image.open(picture).convert("RGB")]
        ahead = processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
        inputs = processor(text=[prompt + reference + "<|im_end|>\n"], images=images, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :ahead] = -100
        labels[:, -1] = -100  # the line end after the turn is not learned
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, tokens = total + loss.item() * count, tokens + count
    return total / tokens


def library_model(base: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def error_line(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """Run a command that must fail with one line and this exit code; return the line."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == code
    printed = capsys.readouterr().err
    line = printed.splitlines()[-1]
    assert line.startswith("error: ") and printed.count("error: ") == 1 and "Traceback" not in printed
    return line


def test_loss_is_that_of_the_library(
    base: Path, adapter: Path, shards: Path, pictures: list[Path], references: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel

    options: Any = {"title": "", "limit": None, "batch_size": 3, "max_new_tokens": 2}
    numbers, _ = evaluate(load_captioner(str(base), adapter), shards, tmp_path, **options)
    before = library_loss(library_model(base), base, pictures, references)
    tuned = PeftModel.from_pretrained(library_model(base), str(adapter)).eval()
    after = library_loss(tuned, base, pictures, references)
    assert numbers["loss_before"] == pytest.approx(before, rel=1e-5)
    assert numbers["loss"] == pytest.approx(after, rel=1e-5)
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_loss_and_captions_do_not_depend_on_the_batch_size(base: Path, shards: Path, batch_size: int) -> None:
    captioner = load_captioner(str(base))
    ours = ShardEvaluation(captioner, shards, limit=None, batch_size=batch_size)
    other = ShardEvaluation(captioner, shards, limit=None, batch_size=3)
    assert ours.loss("") == pytest.approx(other.loss(""), rel=1e-6)
    assert ours.answers(8) == other.answers(8)


def test_workers_give_the_same_samples_in_the_same_order(base: Path, shards: Path) -> None:
    captioner = load_captioner(str(base))
    alone = ShardEvaluation(captioner, shards, limit=None, batch_size=2)
    helped = ShardEvaluation(captioner, shards, limit=None, batch_size=2, workers=2)
    assert helped.answers(4) == alone.answers(4)
    assert [answer.asked.key for answer in alone.answers(4)] == [f"sample{n}" for n in range(7)]


def test_evaluate_with_an_adapter_writes_both_predictions_and_a_page(
    base: Path, adapter: Path, shards: Path, references: list[str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["evaluate", str(base), "--shards", str(shards), "--out", str(out), "--json", *SHORT]
    assert main([*arguments, "--adapter", str(adapter)]) == 0
    numbers = output(capsys)
    expected = {"n", "loss", "loss_before", "exact_match", "exact_match_before", "bad_samples", "seconds"}
    assert set(numbers) == expected and (numbers["n"], numbers["bad_samples"]) == (7, 0)
    assert json.loads((out / "evaluation.json").read_text()) == numbers
    after, before = (json.loads((out / f"predictions{end}.json").read_text()) for end in ("", "_base"))
    for predictions, key in ((after, "exact_match"), (before, "exact_match_before")):
        assert [entry["image_id"] for entry in predictions] == [100, 101, 102, 103, 104, 105, "sample6"]
        assert all(set(entry) == {"image_id", "caption"} for entry in predictions)
        assert exact_match([entry["caption"] for entry in predictions], references) == numbers[key]
    assert after != before
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 7 and all(reference in page for reference in references)

    assert main(arguments) == 0  # again without the adapter: nothing of the other model stays
    assert set(output(capsys)) == expected - {"loss_before", "exact_match_before"}
    assert json.loads((out / "predictions.json").read_text()) == before
    assert not (out / "predictions_base.json").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.html", "evaluation.json", "predictions.json"
    ]  # fmt: skip


def test_exact_match_counts_captions_that_equal_the_reference(
    base: Path, pictures: list[Path], tmp_path: Path
) -> None:
    captioner = load_captioner(str(base))
    said: dict[str, str] = {}
    for attempt in range(2):  # first to hear what the base says, then with one of its captions as a reference
        references = [
            said.get(path.name, "nothing like it") if n == 0 else "no" for n, path in enumerate(pictures)
        ]
        samples = [
            Sample(path.stem, caption_messages(PROMPT, text), [ImageRef(path)], n, "test")
            for n, (path, text) in enumerate(zip(pictures, references, strict=True))
        ]
        pack(samples, tmp_path / f"shards{attempt}")
        options: Any = {"title": "", "limit": None, "batch_size": 4, "max_new_tokens": 8}
        numbers, rows = evaluate(captioner, tmp_path / f"shards{attempt}", tmp_path, **options)
        said = {path.name: row.after for path, row in zip(pictures, rows, strict=True)}
        assert numbers["exact_match"] == pytest.approx(attempt / len(pictures))
        assert [row.after_matches for row in rows] == [attempt == 1] + [False] * (len(pictures) - 1)


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_limit_takes_the_first_samples(
    base: Path, shards: Path, tmp_path: Path, capsys: Any, limit: int
) -> None:
    arguments = ["evaluate", str(base), "--shards", str(shards), "--out", str(tmp_path), "--json", *SHORT]
    assert main([*arguments, "--limit", str(limit)]) == 0
    assert output(capsys)["n"] == min(limit, 7)
    ids = [entry["image_id"] for entry in json.loads((tmp_path / "predictions.json").read_text())]
    assert ids == [100, 101, 102, 103, 104, 105, "sample6"][:limit]


def test_two_samples_of_one_image_give_one_result(base: Path, pictures: list[Path], tmp_path: Path) -> None:
    samples = [
        Sample(key, caption_messages(PROMPT, "a"), [ImageRef(path)], image_id, "test")
        for key, path, image_id in (("a", pictures[0], 5), ("b", pictures[0], 5), ("c", pictures[1], 6))
    ]
    pack(samples, tmp_path / "shards")
    options: Any = {"title": "", "limit": None, "batch_size": 4, "max_new_tokens": 2}
    numbers, _ = evaluate(load_captioner(str(base)), tmp_path / "shards", tmp_path, **options)
    assert numbers["n"] == 3
    assert [e["image_id"] for e in json.loads((tmp_path / "predictions.json").read_text())] == [5, 6]


def damage(shards: Path, out: Path, samples: list[int]) -> Path:
    """Copy shards and flip a byte of the picture of each of these samples of the first shard."""
    copied = Path(shutil.copytree(shards, out))
    tar = copied / Manifest.load(copied).shards[0].name
    index = load_shard_index(tar.with_name(tar.name + ".idx"))
    content = bytearray(tar.read_bytes())
    for sample in samples:
        member = next(m for e, m in index.members(sample).items() if e != "json")
        content[member.offset + member.size // 2] ^= 0xFF
    tar.write_bytes(content)
    return copied


def test_damaged_sample_is_named_and_counted_and_the_rest_goes_on(
    base: Path, shards: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = damage(shards, tmp_path / "broken", [1])
    out = tmp_path / "out"
    assert main(["evaluate", str(base), "--shards", str(broken), "--out", str(out), "--json", *SHORT]) == 0
    captured = capsys.readouterr()
    numbers = json.loads(captured.out.splitlines()[-1])
    assert (numbers["n"], numbers["bad_samples"]) == (6, 1)
    assert "sample1" in captured.err and "checksum differs" in captured.err
    ids = [entry["image_id"] for entry in json.loads((out / "predictions.json").read_text())]
    assert ids == [100, 102, 103, 104, 105, "sample6"]


def test_nothing_but_damaged_samples_is_a_failure(
    base: Path, shards: Path, tmp_path: Path, capsys: Any
) -> None:
    broken = damage(shards, tmp_path / "broken", [0, 1, 2])
    arguments = [
        "evaluate",
        str(base),
        "--shards",
        str(broken),
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "3",
    ]
    line = error_line(capsys, 1, *arguments)
    assert "none of 3 samples could be read" in line and "sample0" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_predict_prints_json_and_a_table(
    base: Path, adapter: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in pictures[:3]:
        shutil.copyfile(path, folder / path.name)
    (folder / "notes.txt").write_text("not a picture")
    files = [str(folder), str(pictures[4])]
    assert main(["predict", str(base), *files, "--adapter", str(adapter), "--json", *SHORT]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)  # the object alone: the table goes to stderr
    assert printed["prompt"] == PROMPT and "before" in captured.err
    images = [str(folder / path.name) for path in pictures[:3]] + [str(pictures[4])]
    assert [entry["image"] for entry in printed["predictions"]] == images
    assert all(set(entry) == {"image", "caption", "before"} for entry in printed["predictions"])

    assert main(["predict", str(base), *files, "--json", *SHORT, "--prompt", "Describe the picture."]) == 0
    other = output(capsys)
    assert all(set(entry) == {"image", "caption"} for entry in other["predictions"])
    said, before = other["predictions"], printed["predictions"]
    assert [e["caption"] for e in said] != [e["before"] for e in before]  # another prompt

    assert main(["predict", str(base), *files, *SHORT]) == 0
    captured = capsys.readouterr()
    assert "picture" in captured.out and "caption" in captured.out


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        "import sys; from qwenvl_dist.__main__ import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--adapter" in done.stdout


def test_predict_names_what_is_wrong(base: Path, pictures: list[Path], tmp_path: Path, capsys: Any) -> None:
    broken, text, empty = tmp_path / "broken.jpg", tmp_path / "text.jpg", tmp_path / "empty"
    broken.write_bytes(pictures[0].read_bytes()[:600])
    text.write_text("not a picture")
    empty.mkdir()
    good = str(pictures[0])
    for path, reason in (
        (broken, "cannot be decoded"),
        (text, "cannot be decoded"),
        (empty, "holds no picture"),
        (tmp_path / "missing.jpg", "cannot be read (No such file"),
    ):
        line = error_line(capsys, 2, "predict", str(base), good, str(path))
        assert str(path) in line and reason in line
    line = error_line(capsys, 2, "predict", str(tmp_path / "nowhere"), good)
    assert str(tmp_path / "nowhere") in line and "no such folder" in line
    assert "no config.json" in error_line(capsys, 2, "predict", str(empty), good)
    assert "no adapter_config.json" in error_line(
        capsys, 2, "predict", str(base), good, "--adapter", str(empty)
    )
    for flag, value, rule in (
        ("--batch-size", "0", "must be at least 1"),
        ("--max-new-tokens", "-3", "must be at least 1"),
        ("--image-size", "281", "multiple of 28"),
        ("--image-size", "big", "must be a side"),
        ("--image-size", "9000,800", "swap or widen"),
        ("--image-size", "1,2", "greater than or equal to 784"),
        ("--prompt", "a <|image_pad|> b", "2 picture placeholders"),
    ):
        line = error_line(capsys, 2, "predict", str(base), good, flag, value)
        assert rule in line and (flag == "--prompt" or f"{flag} {value}" in line)


def test_evaluate_names_what_is_wrong(base: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "out")
    line = error_line(capsys, 2, "evaluate", str(base), "--shards", str(tmp_path / "nowhere"), "--out", out)
    assert "nowhere: no such folder" in line
    (tmp_path / "file").write_text("")
    line = error_line(
        capsys, 2, "evaluate", str(base), "--shards", str(shards), "--out", str(tmp_path / "file")
    )
    assert "--out" in line and "file" in line
    line = error_line(capsys, 2, "evaluate", str(base), "--shards", str(shards), "--out", out, "--limit", "0")
    assert "--limit 0: must be at least 1" in line


def test_model_with_damaged_weights_is_one_line(
    base: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    cut = Path(shutil.copytree(base, tmp_path / "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(cut) in error_line(capsys, 2, "predict", str(cut), str(pictures[0]))
    weights.unlink()
    assert str(cut) in error_line(capsys, 2, "predict", str(cut), str(pictures[0]))


def test_config_of_another_shape_is_one_line(
    base: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    content = (other / "config.json").read_text()
    (other / "config.json").write_text(
        content.replace('"intermediate_size": 256', '"intermediate_size": 128')
    )
    assert (other / "config.json").read_text() != content
    line = error_line(capsys, 2, "predict", str(other), str(pictures[0]))
    assert str(other) in line and "6 mismatched keys" in line and "mlp.down_proj" in line
