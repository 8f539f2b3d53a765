"""BLEU, METEOR, ROUGE-L and CIDEr through pycocoevalcap, the COCO captions server's own code.

Captions go through the Penn Treebank tokenizer of Stanford CoreNLP first, which like METEOR is a Java program that
pycocoevalcap brings along. That one is run from here: pycocoevalcap's call writes into its own package folder and does
not notice when Java fails or a line is lost.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.scores.captions import ImageCaption

KINDS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr")
BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
JAVA_REMEDY = (
    "install Java 17 or newer (Debian and Ubuntu: `apt-get install openjdk-17-jre-headless`; conda: "
    "`conda install -c conda-forge openjdk=17`) and have `java` on PATH, or set JAVA_HOME"
)
_FORBIDDEN = "|||"  # METEOR's own separator


class ScoringFailed(CheckFailed):
    """Java, or a program that it runs, did not do its work."""


@dataclass(frozen=True)
class Scores:
    """The scores of a set of captions, by name."""

    overall: dict[str, float]
    each: list[dict[str, float]]  # of each picture, in the order given


def find_java() -> str | None:
    """Return the Java program: the one on PATH, else JAVA_HOME's, else None."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java") or (shutil.which(str(Path(home) / "bin" / "java")) if home else None)


def missing_java() -> str | None:
    """Return what is missing for scores and how to get it; None when nothing is."""
    return None if find_java() else f"caption scores need Java, which is not here; {JAVA_REMEDY}"


class CaptionScorer:
    """Computes scores of some `kinds`. A context manager, since METEOR's program stays for several sets.

    It takes some seconds and up to 2 GiB of memory to start, and does so when it is first needed.
    """

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        self.kinds = tuple(kind for kind in KINDS if kind in kinds)
        self._meteor: Any = None

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End METEOR's program."""
        if self._meteor is not None:
            self._meteor.stop()
            self._meteor = None

    def score(self, captions: Sequence[ImageCaption]) -> Scores:
        """Score each picture's caption against its references. Raises ScoringFailed.

        Pictures without a reference have no part in it and get no scores. CIDEr weighs words by how rare they are
        among the references of all pictures given, so it is comparable only between equal sets, and 0 for one picture.
        """
        told = [number for number, each in enumerate(captions) if each.references]
        each: list[dict[str, float]] = [{} for _ in captions]
        if not told or not self.kinds:
            return Scores({}, each)
        java = find_java()
        if java is None:
            raise ScoringFailed(missing_java())
        texts = [(captions[number].caption, *captions[number].references) for number in told]
        tokenized = iter(tokenize(java, [text for group in texts for text in group]))
        groups = [[next(tokenized) for _ in group] for group in texts]
        said = {number: [group[0]] for number, group in zip(told, groups, strict=True)}
        references = {number: group[1:] for number, group in zip(told, groups, strict=True)}
        overall: dict[str, float] = {}
        for kind in self.kinds:
            for name, total, parts in self._compute(kind, java, references, said):
                overall[name] = float(total)
                for number, part in zip(told, parts, strict=True):
                    each[number][name] = float(part)
        return Scores(overall, each)

    def _compute(self, kind: str, java: str, references: Any, said: Any) -> Iterable[tuple[str, Any, Any]]:
        if kind == "Bleu":
            from pycocoevalcap.bleu.bleu import Bleu

            totals, parts = Bleu(4).compute_score(references, said, verbose=0)
            return zip(BLEU, totals, parts, strict=True)
        if kind == "METEOR":
            return [(kind, *self._run_meteor(java, references, said))]
        if kind == "ROUGE_L":
            from pycocoevalcap.rouge.rouge import Rouge

            return [(kind, *Rouge().compute_score(references, said))]
        from pycocoevalcap.cider.cider import Cider

        return [(kind, *Cider().compute_score(references, said))]

    def _run_meteor(self, java: str, references: Any, said: Any) -> tuple[float, list[float]]:
        if self._meteor is None:
            self._meteor = _start_meteor(java)
        plain = {
            number: [text.replace(_FORBIDDEN, " ") for text in group] for number, group in references.items()
        }
        try:
            total, parts = self._meteor.compute_score(plain, said)
        except (OSError, ValueError) as error:
            self.__exit__()
            raise ScoringFailed(
                f"METEOR's program ended before it had scored all captions ({error}); it needs 2 GiB of free memory: "
                "free some, or leave METEOR out of the scores"
            ) from error
        return _number(total), [_number(part) for part in parts]


def _number(score: float) -> float:
    return 0.0 if math.isnan(score) else score  # METEOR's, of nothing but empty captions


def tokenize(java: str, texts: Sequence[str]) -> list[str]:
    """Return the texts as the Penn Treebank tokenizer cuts them, lower case, without punctuation.

    Raises ScoringFailed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # One line each, whatever Java takes for the end of a line.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    try:
        done = subprocess.run(
            command, input=lines.encode("utf-8", "replace"), capture_output=True, check=False
        )
    except OSError as error:
        raise ScoringFailed(f"{java} cannot be run ({error.strerror}); {JAVA_REMEDY}") from error
    found = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(found) != len(texts):
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[0]
        raise ScoringFailed(
            f"the tokenizer of captions gave {len(found)} of {len(texts)} lines and exit code {done.returncode} "
            f"({reason}); {JAVA_REMEDY}"
        )
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in found]


def _start_meteor(java: str) -> Any:
    from pycocoevalcap.meteor import meteor

    class Meteor(meteor.Meteor):
        """pycocoevalcap's, with its Java found, UTF-8 in every locale, and messages that nobody reads thrown away."""

        def __init__(self) -> None:
            self.meteor_cmd = [
                java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", meteor.METEOR_JAR,
                "-", "-", "-stdio", "-l", "en", "-norm",
            ]  # fmt: skip
            self.lock = threading.Lock()
            self.meteor_p = subprocess.Popen(
                self.meteor_cmd,
                cwd=Path(meteor.__file__).parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )

        def stop(self) -> None:
            self.meteor_p.kill()
            self.meteor_p.communicate()

        def __del__(self) -> None:
            pass  # the original's waits for a lock that a failed call still holds

    try:
        return Meteor()
    except OSError as error:
        raise ScoringFailed(f"{java} cannot be run ({error.strerror}); {JAVA_REMEDY}") from error
