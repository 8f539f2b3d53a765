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
from qwenvl_dist.evaluate.captioner import Captioner, load_captioner
from qwenvl_dist.evaluate.compare import Comparison, exact_match
from qwenvl_dist.evaluate.run import Scoring, ShardEvaluation, evaluate, models_to_compare
from qwenvl_dist.merge.merge import merge
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model.base_folder import BaseFolder
from tests.http_server import FileServer
from tests.training.forked import ForkedRanks

PROMPT = "COCO Yes:"
SHORT_ANSWERS = ("--max-new-tokens", "8", "--batch-size", "4")
SHORT = (*SHORT_ANSWERS, "--scores", "none")


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


def measure(
    model: Path,
    shards: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    batch_size: int = 4,
    new_tokens: int = 8,
) -> tuple[dict[str, Any], list[Comparison]]:
    """Evaluate without scores."""

    def load(name: str, adapter: Path | None) -> Captioner:
        return load_captioner(name, adapter)

    return evaluate(
        ShardEvaluation(shards, limit=None, batch_size=batch_size),
        models_to_compare(load, str(model), adapter),
        out,
        title="",
        max_new_tokens=new_tokens,
        scoring=Scoring(kinds=()),
    )


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

    numbers, _ = measure(base, shards, tmp_path, adapter=adapter, batch_size=3, new_tokens=2)
    before = library_loss(library_model(base), base, pictures, references)
    tuned = PeftModel.from_pretrained(library_model(base), str(adapter)).eval()
    after = library_loss(tuned, base, pictures, references)
    assert numbers["loss_before"] == pytest.approx(before, rel=1e-5)
    assert numbers["loss"] == pytest.approx(after, rel=1e-5)
    assert abs(after - before) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_loss_and_captions_do_not_depend_on_the_batch_size(base: Path, shards: Path, batch_size: int) -> None:
    captioner = load_captioner(str(base))
    ours = ShardEvaluation(shards, limit=None, batch_size=batch_size)
    other = ShardEvaluation(shards, limit=None, batch_size=3)
    assert ours.loss(captioner, "") == pytest.approx(other.loss(captioner, ""), rel=1e-6)
    assert ours.answers(captioner, 8).said == other.answers(captioner, 8).said


def test_workers_give_the_same_samples_in_the_same_order(base: Path, shards: Path) -> None:
    captioner = load_captioner(str(base))
    alone = ShardEvaluation(shards, limit=None, batch_size=2).answers(captioner, 4)
    helped = ShardEvaluation(shards, limit=None, batch_size=2, workers=2).answers(captioner, 4)
    assert helped.said == alone.said
    assert [asked.key for asked, _ in alone.said] == [f"sample{n}" for n in range(7)]


def test_evaluate_with_an_adapter_writes_both_predictions_and_a_page(
    base: Path, adapter: Path, shards: Path, references: list[str], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["evaluate", str(base), "--shards", str(shards), "--out", str(out), "--json", *SHORT]
    assert main([*arguments, "--adapter", str(adapter)]) == 0
    numbers = output(capsys)
    alone = {"n", "images", "loss", "exact_match", "captions_per_second", "bad_samples", "seconds"}
    before = {"loss_before", "exact_match_before", "captions_per_second_before"}
    assert set(numbers) == alone | before and (numbers["n"], numbers["bad_samples"]) == (7, 0)
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
    assert set(output(capsys)) == alone
    assert json.loads((out / "predictions.json").read_text()) == before
    assert not (out / "predictions_base.json").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "captions.json", "comparison.html", "evaluation.json", "predictions.json"
    ]  # fmt: skip


def on_two_ranks(arguments: list[str]) -> None:
    """One rank of two: what the command does."""
    assert main(arguments) == 0


@pytest.mark.dist
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")
def test_two_ranks_compare_base_adapter_and_merged_as_one_does(
    base: Path, adapter: Path, shards: Path, tmp_path: Path, capsys: Any
) -> None:
    merge(read_trained(adapter), BaseFolder(base), tmp_path / "merged", dtype="float32")
    arguments = [
        "evaluate", str(base), "--adapter", str(adapter), "--merged", str(tmp_path / "merged"), "--shards", str(shards),
        "--scores", "Bleu,CIDEr", "--max-new-tokens", "8", "--batch-size", "2", "--json",
    ]  # fmt: skip
    ranks = ForkedRanks(on_two_ranks, ([*arguments, "--out", str(tmp_path / "two")],), 2, tmp_path / "log")
    assert ranks.wait(120) == [0, 0], ranks.said()
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    alone = output(capsys)
    printed = [line for line in ranks.said().splitlines() if line.startswith("{")]
    together = json.loads(printed[0])
    assert len(printed) == 1 and set(together) == set(alone)
    for name, value in alone.items():
        if name != "seconds" and not name.startswith("captions_per_second"):
            assert together[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    for path in sorted((tmp_path / "one").glob("*.json")):
        if path.name != "evaluation.json":
            assert (tmp_path / "two" / path.name).read_text() == path.read_text()
    assert alone["same_captions_merged"] == 1 and alone["loss_merged"] == pytest.approx(alone["loss"])
    assert alone["loss"] != pytest.approx(alone["loss_before"], rel=1e-3)
    assert {"Bleu_1", "Bleu_4", "CIDEr", "CIDEr_before", "CIDEr_merged"} <= set(
        alone
    ) and "METEOR" not in alone
    captions = json.loads((tmp_path / "one" / "captions.json").read_text())
    best = max(captions, key=lambda entry: entry["scores"]["CIDEr"])
    assert alone["best"][0]["CIDEr"] == best["scores"]["CIDEr"]
    assert len(alone["best"]) == len(alone["worst"]) == 3
    assert [entry["merged"]["answer"] for entry in captions] == [entry["answer"] for entry in captions]


def test_without_java_captions_are_written_and_the_remedy_named(
    base: Path, shards: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    out = tmp_path / "out"
    arguments = ["evaluate", str(base), "--shards", str(shards), "--out", str(out), "--json", *SHORT_ANSWERS]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "no scores, predictions only: caption scores need Java" in captured.err
    assert "apt-get install openjdk-17-jre-headless" in captured.err
    assert "CIDEr" not in json.loads(captured.out.splitlines()[-1])
    assert len(json.loads((out / "predictions.json").read_text())) == 7
    assert "'CIDER' is none of Bleu" in error_line(capsys, 2, *arguments, "--scores", "CIDER")
    assert "--merged" in error_line(capsys, 2, *arguments, "--merged", str(tmp_path))


def test_exact_match_counts_captions_that_equal_the_reference(
    base: Path, pictures: list[Path], tmp_path: Path
) -> None:
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
        numbers, rows = measure(base, tmp_path / f"shards{attempt}", tmp_path)
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
    numbers, _ = measure(base, tmp_path / "shards", tmp_path, new_tokens=2)
    assert (numbers["n"], numbers["images"]) == (3, 2)
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
        "--scores",
        "none",
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
    assert main(["predict", str(base), *files, "--adapter", str(adapter), "--json", *SHORT_ANSWERS]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)  # the object alone: the table goes to stderr
    assert printed["prompt"] == PROMPT and "before" in captured.err
    images = [str(folder / path.name) for path in pictures[:3]] + [str(pictures[4])]
    assert [entry["image"] for entry in printed["predictions"]] == images
    assert all(set(entry) == {"image", "caption", "before"} for entry in printed["predictions"])

    assert (
        main(["predict", str(base), *files, "--json", *SHORT_ANSWERS, "--prompt", "Describe the picture."])
        == 0
    )
    other = output(capsys)
    assert all(set(entry) == {"image", "caption"} for entry in other["predictions"])
    said, before = other["predictions"], printed["predictions"]
    assert [e["caption"] for e in said] != [e["before"] for e in before]  # another prompt

    assert main(["predict", str(base), *files, *SHORT_ANSWERS]) == 0
    captured = capsys.readouterr()
    assert "picture" in captured.out and "caption" in captured.out


def test_predict_takes_urls_and_writes_its_json(
    base: Path, pictures: list[Path], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "said.json"
    with FileServer(pictures[0].parent) as server:
        url = f"{server.url}/{pictures[0].name}"
        places = [url, str(pictures[1])]
        assert main(["predict", str(base), *places, "--out", str(out), "--json", *SHORT_ANSWERS]) == 0
        said = json.loads(out.read_text())
        assert said == output(capsys)
        assert [entry["image"] for entry in said["predictions"]] == places
        line = error_line(capsys, 2, "predict", str(base), f"{server.url}/none.jpg")
        assert f"{server.url}/none.jpg: cannot be read (no such file (404))" in line
    assert main(["predict", str(base), *map(str, pictures[:2]), "--json", *SHORT_ANSWERS]) == 0
    local = output(capsys)["predictions"]
    assert [entry["caption"] for entry in local] == [entry["caption"] for entry in said["predictions"]]
    line = error_line(capsys, 2, "predict", str(base), places[1], "--out", str(tmp_path / "no" / "said.json"))
    assert "its folder does not exist" in line


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
