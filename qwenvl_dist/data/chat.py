"""Messages -> input_ids, labels and M-RoPE positions, equal to the hub processor's.

The chat template of the model's own processor renders the text; image placeholders are then widened to as many tokens
as the picture gives, counted from its grid, never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_dist.data.formats import is_learned, texts_in
from qwenvl_dist.errors import UserError

IGNORE = -100  # label of a token without loss
IMAGE = "<|image_pad|>"
ANSWER = "<|im_start|>assistant\n"  # begins a turn of the assistant
HEADS_KEPT = 256  # encoded beginnings of conversations
HEAD_CHARACTERS = 1000  # longer ones are hardly ever said twice
Int64 = NDArray[np.int64]
Grid = tuple[int, int, int]  # (time, height, width) of one picture, in patches


class TooLong(Exception):  # noqa: N818 (names the sample's state; counted, not fatal)
    """A sample exceeds max_length, by so many tokens, and must not or cannot be cut to it."""

    def __init__(self, message: str, excess: int) -> None:
        super().__init__(message)
        self.excess = excess


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as the model reads it."""

    input_ids: Int64  # (seq,)
    labels: Int64  # (seq,), IGNORE = no loss
    position_ids: Int64  # (3, seq): time, height, width
    # (seq,): 0 for a prefix that several answers share, k for the k-th of them; None for a plain conversation
    segments: Int64 | None = None
    cut: int = 0  # tokens of an answer that max_length left no room for


def image_tokens(grid: Grid, merge_size: int) -> int:
    """Return how many tokens a picture takes in the sequence."""
    return grid[0] * grid[1] * grid[2] // merge_size**2


def mrope_positions(is_image: NDArray[np.bool_], grids: Sequence[Grid], merge_size: int) -> Int64:
    """Return the (3, seq) positions of Qwen2-VL's multimodal rotary embedding.

    Text advances all three axes together; a picture spans its merged grid and then advances by its longer side
    (arXiv:2409.12191, section 2.1; the same as `Qwen2VLModel.get_rope_index`).
    """
    positions = np.empty((3, len(is_image)), np.int64)
    cursor = next_position = 0
    edges = np.flatnonzero(np.diff(is_image, prepend=False, append=False))
    for image, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        positions[:, cursor:start] = np.arange(start - cursor) + next_position
        next_position += start - cursor
        time, height, width = grids[image][0], grids[image][1] // merge_size, grids[image][2] // merge_size
        assert end - start == time * height * width, "placeholder count and grid disagree"
        positions[:, start:end] = np.indices((time, height, width)).reshape(3, -1) + next_position
        next_position += max(height, width)
        cursor = end
    positions[:, cursor:] = np.arange(len(is_image) - cursor) + next_position
    return positions


class ChatEncoder:
    """Encodes conversations with one processor; picklable, used inside loader workers."""

    def __init__(self, processor: Any, max_length: int, may_cut: bool = True) -> None:
        self.may_cut = may_cut  # the end of an answer that makes a sample too long; else that raises TooLong
        self.tokenizer = processor.tokenizer
        self.template = processor.chat_template or self.tokenizer.chat_template
        self.merge_size = int(processor.image_processor.merge_size)
        self.max_length = max_length
        vocabulary = self.tokenizer.get_vocab()
        for token in ("<|im_start|>", "<|im_end|>", IMAGE):
            if token not in vocabulary:
                raise UserError(f"tokenizer: has no token {token!r}; use the tokenizer of a Qwen2-VL model")
        # By text, pictures, and which answers are learned.
        self._heads: dict[
            tuple[str, tuple[Grid, ...], tuple[bool, ...]], tuple[Int64, NDArray[np.bool_], Int64]
        ] = {}
        self.image_token = vocabulary[IMAGE]
        self.end_of_turn = vocabulary["<|im_end|>"]
        self.start_of_turn = vocabulary["<|im_start|>"]
        pad = self.tokenizer.pad_token_id
        self.pad_token = int(pad if pad is not None else self.end_of_turn)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the conversation as text, one placeholder a picture."""
        return self.tokenizer.apply_chat_template(
            # A template might have a meaning of its own for other members.
            [{"role": message["role"], "content": message["content"]} for message in messages],
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _tokenize(self, text: str, answers: Sequence[bool]) -> tuple[Int64, NDArray[np.bool_]]:
        """Return token ids and which of them are learned: an assistant's words and the end of its turn.

        `answers` says of each of its turns whether it is learned. Raises ValueError when some are not and the text has
        another number of turns.
        """
        # Straight to the tokenizer's own library: the wrapper around it costs more than the tokens.
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoded.ids, np.int64)
        learned = np.zeros(len(ids), bool)
        ends = np.flatnonzero(ids == self.end_of_turn)
        offsets = encoded.offsets
        starts = np.flatnonzero(ids == self.start_of_turn).tolist()
        starts = [start for start in starts if text.startswith(ANSWER, offsets[start][0])]
        if all(answers):
            answers = [True] * len(starts)
        elif len(answers) != len(starts):
            raise ValueError(
                f"the chat template makes {len(starts)} turns of the assistant out of {len(answers)}, so which of "
                "them have 'loss' false cannot be told"
            )
        for start, wanted in zip(starts, answers, strict=True):
            if not wanted:
                continue
            end = int(ends[np.searchsorted(ends, start)])
            first = offsets[start][0] + len(ANSWER)
            while start <= end and offsets[start][0] < first:
                start += 1
            learned[start : end + 1] = True
        return ids, learned

    def _widen(
        self, ids: Int64, learned: NDArray[np.bool_], grids: Sequence[Grid]
    ) -> tuple[Int64, NDArray[np.bool_]]:
        placeholders = np.flatnonzero(ids == self.image_token)
        if len(placeholders) != len(grids):
            raise ValueError(f"{len(placeholders)} picture placeholders in the text, {len(grids)} pictures")
        repeats = np.ones(len(ids), np.int64)
        repeats[placeholders] = [image_tokens(grid, self.merge_size) for grid in grids]
        return np.repeat(ids, repeats), np.repeat(learned, repeats)

    def _cut(self, ids: Int64, learned: NDArray[np.bool_]) -> tuple[Int64, NDArray[np.bool_]]:
        """Cut the tail of the last learned words, so that the sequence fits and still ends its turn.

        Turns behind them teach nothing: without a picture, they go first.
        """
        whole, excess = len(ids), len(ids) - self.max_length
        if excess <= 0:
            return ids, learned
        if not self.may_cut:
            raise TooLong(f"{whole} tokens exceed max_length {self.max_length}", excess)
        taught = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else whole
        behind = np.flatnonzero(ids[taught:] == self.start_of_turn)
        if behind.size and self.image_token not in ids[taught:]:
            end = taught + int(behind[0])
            ids, learned, excess = ids[:end], learned[:end], end - self.max_length
            if excess <= 0:
                return ids, learned
        words = np.flatnonzero(learned & (ids != self.end_of_turn))
        tail = words[len(words) - excess :] if excess < len(words) else words[:0]
        if not tail.size or tail[-1] - tail[0] != excess - 1:
            raise TooLong(
                f"{whole} tokens, {int((ids == self.image_token).sum())} of them visual: "
                f"no cut of the caption brings it under max_length {self.max_length}",
                excess,
            )
        keep = np.ones(len(ids), bool)
        keep[tail] = False
        return ids[keep], learned[keep]

    def encode(self, messages: list[dict[str, Any]], grids: Sequence[Grid]) -> EncodedChat:
        """Encode a whole conversation for training.

        Raises TooLong, or ValueError when pictures and text disagree or a text would begin or end a turn by itself.
        """
        for text in texts_in(messages):
            for token in ("<|im_start|>", "<|im_end|>"):
                if token in text:
                    raise ValueError(f"a text holds {token!r}, which would begin or end a turn")
        text = self.render(messages)
        answers = tuple(is_learned(message) for message in messages if message["role"] == "assistant")
        # The marks of a turn part the text before anything else is looked at, so the last answer and what comes before
        # it give the same tokens apart as together; a caption's prompt is then encoded once for each picture size.
        before, mark, answer = text.rpartition(ANSWER)
        if mark and len(before) <= HEAD_CHARACTERS and before.count(IMAGE) == len(grids):
            head_ids, head_learned, head_positions = self._head(before, tuple(grids), answers[:-1])
            ids, learned = self._tokenize(mark + answer, answers[-1:])
            ids = np.concatenate([head_ids, ids])
            if len(ids) <= self.max_length:
                learned = np.concatenate([head_learned, learned])
                positions = np.empty((3, len(ids)), np.int64)
                positions[:, : len(head_ids)] = head_positions
                next_position = head_positions.max(initial=-1) + 1
                positions[:, len(head_ids) :] = np.arange(
                    next_position, next_position + len(ids) - len(head_ids)
                )
                return EncodedChat(ids, np.where(learned, ids, IGNORE), positions)
        ids, learned = self._widen(*self._tokenize(text, answers), grids)
        whole = len(ids)
        ids, learned = self._cut(ids, learned)
        positions = mrope_positions(ids == self.image_token, grids, self.merge_size)
        return EncodedChat(ids, np.where(learned, ids, IGNORE), positions, cut=whole - len(ids))

    def encode_each(self, messages: list[dict[str, Any]], grids: Sequence[Grid], mark: str) -> EncodedChat:
        """Encode the answers that `mark` separates in the last message behind one prefix.

        Each has the tokens, labels and positions that it would have alone, and is to attend to the prefix and itself.
        A conversation with a single answer, with words to learn before the last, or whose last is not learned, is
        encoded plainly. Raises what `encode` does.
        """
        *before, last = messages
        answers = [answer for answer in map(str.strip, "".join(texts_in([last])).split(mark)) if answer]
        if not is_learned(last) or len(answers) < 2 or any(map(is_learned, before)):
            return self.encode(messages, grids)
        alone = []
        for answer in answers:
            last = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            alone.append(self.encode([*before, last], grids))
        start = int(np.flatnonzero(alone[0].labels != IGNORE)[0])
        # What follows the last learned token is of no use to anybody.
        ends = [int(np.flatnonzero(chat.labels != IGNORE)[-1]) + 1 for chat in alone]
        length = start + sum(end - start for end in ends)
        if length > self.max_length:
            raise TooLong(
                f"{length} tokens in {len(answers)} answers exceed max_length {self.max_length}",
                length - self.max_length,
            )
        pieces = [
            (alone[0], slice(0, start)),
            *((c, slice(start, e)) for c, e in zip(alone, ends, strict=True)),
        ]
        return EncodedChat(
            np.concatenate([chat.input_ids[piece] for chat, piece in pieces]),
            np.concatenate([chat.labels[piece] for chat, piece in pieces]),
            np.concatenate([chat.position_ids[:, piece] for chat, piece in pieces], axis=1),
            np.repeat(np.arange(len(pieces)), [piece.stop - piece.start for _, piece in pieces]),
            cut=sum(chat.cut for chat in alone),
        )

    def _head(
        self, text: str, grids: tuple[Grid, ...], answers: tuple[bool, ...]
    ) -> tuple[Int64, NDArray[np.bool_], Int64]:
        """Return ids, learned and positions of what comes before the last answer."""
        key = text, grids, answers
        head = self._heads.get(key)
        if head is None:
            ids, learned = self._widen(*self._tokenize(text, answers), grids)
            head = ids, learned, mrope_positions(ids == self.image_token, grids, self.merge_size)
            if len(self._heads) >= HEADS_KEPT:
                self._heads.clear()
            self._heads[key] = head
        return head

    def encode_prompt(self, messages: list[dict[str, Any]], grids: Sequence[Grid]) -> Int64:
        """Return the input_ids (seq,) of a conversation that the model is to answer."""
        text = self.render(messages, add_generation_prompt=True)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
        return self._widen(ids, np.zeros(len(ids), bool), grids)[0]
