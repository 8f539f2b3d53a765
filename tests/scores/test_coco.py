import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.prompts import Asked
from qwenvl_dist.scores import coco
from qwenvl_dist.scores.captions import ImageCaption, by_image, split_captions
from qwenvl_dist.scores.coco import BLEU, CaptionScorer, Scores, ScoringFailed, find_java, missing_java

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")


def said(image_id: int | str, caption: str, *references: str) -> ImageCaption:
    return ImageCaption(image_id, str(image_id), "", references, caption, caption)


@needs_java
def test_the_fields_numbers_come_out(shared_data: Path) -> None:
    """Both sets through one METEOR, whose program takes longest to start."""
    folder = shared_data / "cocoeval"
    golden: dict[str, Any] = json.loads((folder / "golden_scores.json").read_text())
    with CaptionScorer() as scorer:
        for name in ("fakecap126", "human_leave_one_out"):
            known = golden[name]
            references: dict[int, list[str]] = {}
            for annotation in json.loads((folder / known["refs"]).read_text())["annotations"]:
                references.setdefault(annotation["image_id"], []).append(annotation["caption"])
            results = json.loads((folder / known["results"]).read_text())
            captions = [said(r["image_id"], r["caption"], *references[r["image_id"]]) for r in results]
            scores = scorer.score(captions)
            assert len(scores.each) == known["n"]
            assert scores.overall == pytest.approx(known["scores"], abs=1e-4)
            mean = sum(each["CIDEr"] for each in scores.each) / known["n"]
            assert mean == pytest.approx(known["scores"]["CIDEr"], abs=1e-4)
            assert all(set(each) == set(known["scores"]) for each in scores.each)


@needs_java
def test_every_caption_keeps_its_line_whatever_it_holds() -> None:
    strange = [
        "",
        "one\u2028two\x85three\r\nfour",
        "\x00 \ufffd (ok)",
        "A ||| Bus. ",
        "!?",
        "  ",
        "half \ud800",
    ]
    java = find_java()
    assert java is not None
    assert coco.tokenize(java, [*strange, "the end"])[-1] == "the end"
    assert coco.tokenize(java, strange)[:2] == ["", "one two three four"]
    assert coco.tokenize(java, ["", ""]) == ["", ""]
    captions = [said(n, text, "a white ||| bus", "a bus") for n, text in enumerate(strange)]
    with CaptionScorer(("Bleu", "ROUGE_L", "CIDEr")) as scorer:
        scores = scorer.score(
            [*captions, said("alone", "a bus"), said("last", "a dog runs by", "a dog runs by")]
        )
    assert scores.each[len(strange)] == {}  # nobody knows a reference
    assert scores.each[-1]["ROUGE_L"] == pytest.approx(1.0)
    assert scores.each[-1]["CIDEr"] == pytest.approx(10.0)
    assert scores.each[0]["CIDEr"] == 0


@needs_java
def test_only_what_is_asked_for_is_computed() -> None:
    captions = [said(1, "a bus", "a bus"), said(2, "a dog", "a cat")]
    assert set(CaptionScorer(("CIDEr",)).score(captions).overall) == {"CIDEr"}
    assert set(CaptionScorer(("Bleu",)).score(captions).overall) == set(BLEU)
    assert CaptionScorer(()).score(captions) == Scores({}, [{}, {}])
    assert CaptionScorer().score([]) == Scores({}, [])


def test_without_java_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "openjdk-17-jre-headless" in (missing_java() or "")
    with pytest.raises(ScoringFailed, match=r"need Java, which is not here; install Java 17"):
        CaptionScorer(("CIDEr",)).score([said(1, "a", "a")])
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "java"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert missing_java() is None
    with pytest.raises(ScoringFailed, match=r"gave 0 of 2 lines and exit code 3 \(out of order\)"):
        CaptionScorer(("CIDEr",)).score([said(1, "a", "a")])


def test_joined_captions_are_parted_and_the_first_is_scored() -> None:
    assert split_captions("A  bus.&& A\nwhite bus. &&", "&&") == ["A bus.", "A white bus."]
    answers = [
        (Asked("k1", 7, "A bus.&&A white bus.", "COCO Yes:"), "a van &&a bus"),
        (Asked("k2", 8, "A dog."), "&& &&"),
        (Asked("k3", 7, "A white bus.&&A van."), "never shown"),
    ]
    first, second = by_image(answers, "&&", "first")
    references = ("A bus.", "A white bus.", "A van.")
    assert first == ImageCaption(7, "k1", "COCO Yes:", references, "a van", "a van &&a bus")
    assert second.caption == ""
    assert by_image(answers, "&&", "whole")[0].caption == "a van &&a bus"
