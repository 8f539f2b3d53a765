"""Which rank the others wait for: each tells twice a second, over the rendezvous store, that it lives and where it is.

Collectives give up after a time, but not with the name of the rank that did not come. And under NCCL a rank that waits
does not come back to Python at all, so that this needs a thread of its own (qwenvl_dist/guard.py ends the process).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.guard import LOOK_EVERY_SECONDS, Guard, RunningTime
from qwenvl_dist.outcome import kind_of, reason_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from qwenvl_dist.distributed import HostGroup

BEAT_EVERY_SECONDS = LOOK_EVERY_SECONDS
LISTEN_SECONDS = 3.0  # without a beat in so long, after an exchange has failed, a rank counts as gone
_LINGER_SECONDS = 1.5  # in which rank 0, whose end may take the store away, lets the others read
GRACE_SECONDS = LISTEN_SECONDS + _LINGER_SECONDS  # of a time-out: to find out who was silent, and to say so
_STORE_SECONDS = 3.0  # for the store to answer once something has failed
_VERDICT = "verdict"
_PACKAGE = Path(__file__).resolve().parent


def collective_seconds(timeout_seconds: float) -> float:
    """Return how long an exchange may wait so that all ranks are gone, with a name, after `timeout_seconds`."""
    return timeout_seconds - GRACE_SECONDS


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int
    host: str
    step: int | None
    end: str  # "", or how it ended: finished | stopped | failed | usage | followed
    reason: str  # of an end
    waits: bool  # for other ranks
    where: str  # the innermost line of this package that its main thread is in
    seconds: float  # how long it has been there

    @classmethod
    def read(cls, data: bytes) -> Beat:
        """Return what `data` says."""
        return cls(**json.loads(data))

    def write(self) -> str:
        """Return it as JSON."""
        return json.dumps(vars(self))


def _place_of_main_thread() -> tuple[str, bool]:
    """Return where the main thread is in this package, and whether it waits inside torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = frame is not None and f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{frame.f_code.co_name} ({path.relative_to(_PACKAGE.parent)}:{frame.f_lineno})", waits
        frame = frame.f_back
    return "an unknown place", waits


def _is_exchange_error(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether a collective failed: for what another rank did, not for a fault of this one."""
    frames = [frame.f_code.co_filename for frame, _ in walk_tb(trace)]
    inside = bool(frames) and f"{os.sep}torch{os.sep}distributed{os.sep}" in frames[-1]
    return isinstance(error, RuntimeError) and (inside or "gloo" in str(error).lower())


class Heartbeat:
    """Beats while the block runs. An exchange that fails in it becomes a CheckFailed that names the rank at fault.

    Rank 0 looks at all ranks, the others at rank 0 and at its verdict; whoever is silent for the time-out, a little of
    which is kept to say so, ends all. Time in which this process itself was stopped does not count. Collective.
    """

    def __init__(self, host: HostGroup, guard: Guard, timeout_seconds: float) -> None:
        self._host, self._guard = host, guard
        # Ahead of the collectives: NCCL's ends the process without a word from Python.
        limit = collective_seconds(timeout_seconds) - 2 * BEAT_EVERY_SECONDS
        # Rank 0 of a large world looks at a part of it each time, and at all of it in a twentieth of the limit.
        self._at_once = max(64, int(host.world_size * BEAT_EVERY_SECONDS / (limit / 20)) + 1)
        self._limit = limit - BEAT_EVERY_SECONDS * ((host.world_size - 1) // self._at_once)
        self._timeout_seconds = timeout_seconds
        self._name = socket.gethostname()
        self._left = threading.Event()
        self._count, self._exchanges, self._exchanges_seen = 0, 0, 0
        self._place, self._there = "", RunningTime()
        self._end, self._reason = "", ""
        self._unanswered = RunningTime()  # of the store
        self._clock, self._looks = RunningTime(), 0
        self._others: dict[int, tuple[bytes, float]] = {}  # what was last heard, and when by the clock
        self._thread: threading.Thread | None = None

    # --- the block ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Start to beat, once every rank has."""
        if self._host.world_size == 1:
            return self
        self._store = _connect(self._timeout_seconds)
        self._say(self._store)
        if self._host.rank == 0:
            self._store.set(_VERDICT, "")
        self._host.barrier()  # from now on every key can be read without waiting for it
        self._unanswered.reset()
        self._others = self._watched()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        self._guard.watch(self._store_is_silent)
        self._guard.tell_others = self._say_why
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others how the block ended. Raises CheckFailed for an exchange that failed through another rank."""
        if self._thread is None:
            return
        follows = error is not None and _is_exchange_error(error, trace)
        if follows:
            self._end = "followed"  # before the others ask who did not come
        blame = self.explain() if follows else None
        self._guard.release(self._store_is_silent)
        self._guard.tell_others = lambda reason: None
        self._left.set()
        self._thread.join(2 * _STORE_SECONDS)
        if error is None:
            self._end = "finished"
        elif not follows:
            self._end, self._reason = kind_of(error), reason_of(error)
        _within(_STORE_SECONDS, lambda: self._say_last(blame))
        if error is None:  # rank 0's end takes the store away: not before all have spoken
            self._host.barrier()
        alone = blame or not isinstance(error, CheckFailed | UserError | None)  # those meet all ranks alike
        if alone and self._host.rank == 0:
            time.sleep(_LINGER_SECONDS)
        if blame:
            raise CheckFailed(blame) from error

    def _say_last(self, blame: str | None) -> None:
        store = _connect(_STORE_SECONDS)
        self._say(store)
        if blame and self._host.rank == 0:
            store.set(_VERDICT, blame)

    # --- beating -----------------------------------------------------------------------------------------------

    def _say(self, store: Store) -> None:
        place, waits = _place_of_main_thread()
        if place != self._place:
            self._place = place
            self._there.reset()
        self._count += 1
        step, seconds = self._guard.outcome.step, round(self._there.tick(), 1)
        beat = Beat(self._count, self._name, step, self._end, self._reason, waits, place, seconds)
        store.set(str(self._host.rank), beat.write())

    def _beat(self) -> None:
        while not self._left.wait(BEAT_EVERY_SECONDS):
            try:
                verdict, silent = self._exchange()
            except Exception:  # whatever it is, the store has not answered; how long, the guard looks at
                with contextlib.suppress(Exception):
                    self._store = _connect(_STORE_SECONDS)
                continue
            self._exchanges += 1
            if self._left.is_set():
                break
            if verdict:
                self._guard.end(verdict)
            if silent:
                if self._host.rank == 0:
                    with contextlib.suppress(Exception):
                        self._store.set(_VERDICT, silent)
                    time.sleep(_LINGER_SECONDS)
                self._guard.end(silent)

    def _watched(self) -> dict[int, tuple[bytes, float]]:
        self._clock.reset()
        return dict.fromkeys(range(1, self._host.world_size) if self._host.rank == 0 else [0], (b"", 0.0))

    def _exchange(self) -> tuple[str, str]:
        """Beat, and return rank 0's verdict and what this rank itself has to say of silent ones; "" for neither."""
        self._say(self._store)
        ranks = list(self._others)
        first = self._looks * self._at_once % (-(-len(ranks) // self._at_once) * self._at_once)
        self._looks += 1
        some = ranks[first : first + self._at_once]
        verdict, *beats = self._store.multi_get([_VERDICT, *map(str, some)])
        silent = self._silent(dict(zip(some, beats, strict=True)))
        return verdict.decode(), f"{silent}; {_ADVICE}" if silent else ""

    def _silent(self, beats: dict[int, bytes]) -> str:
        """Name the ranks that have been silent for the whole time-out, "" when there is none."""
        gone, now = {}, self._clock.tick()
        for rank, data in beats.items():
            before, heard = self._others[rank]
            if data != before:
                self._others[rank] = (data, now)
            elif now - heard >= self._limit and not Beat.read(data).end:
                gone[rank] = Beat.read(data)
        return _no_answer(gone, f"for {self._limit:.0f} s") if gone else ""

    def _store_is_silent(self) -> str | None:
        """Say, to the guard, that the store has not answered for the whole time-out."""
        if self._exchanges != self._exchanges_seen:
            self._exchanges_seen = self._exchanges
            self._unanswered.reset()
        if self._unanswered.tick() < self._limit:
            return None
        return f"{_store_gone(f'for {self._limit:.0f} s')}; {_ADVICE}"

    def _say_why(self, reason: str) -> None:
        """Tell the others, for the guard, why this rank ends, if the store has answered lately."""
        if self._unanswered.seconds < _STORE_SECONDS:
            self._end, self._reason = "failed", reason
            _within(_STORE_SECONDS, lambda: self._say(_connect(_STORE_SECONDS)))

    # --- after a failure ---------------------------------------------------------------------------------------

    def explain(self) -> str | None:
        """Return which rank an exchange failed through, None when it cannot be told. Takes some seconds."""
        answer = _within(LISTEN_SECONDS + _STORE_SECONDS, self._listen)
        if isinstance(answer, BaseException):
            last = self._others.get(0, (b"",))[0]
            if last and Beat.read(last).end == "failed":
                return _failed(0, Beat.read(last))
            return f"{_store_gone('any more')}; {_ADVICE}"
        return f"{answer}; {_ADVICE}" if answer else None

    def _listen(self) -> str | None:
        store = _connect(_STORE_SECONDS)
        ranks = [rank for rank in range(self._host.world_size) if rank != self._host.rank]
        first = dict(zip(ranks, store.multi_get([str(rank) for rank in ranks]), strict=True))
        last, silent = dict(first), set(ranks)
        for _ in range(int(LISTEN_SECONDS / BEAT_EVERY_SECONDS)):
            silent = {rank for rank in silent if last[rank] == first[rank] and not Beat.read(last[rank]).end}
            if not silent:
                break
            time.sleep(BEAT_EVERY_SECONDS)
            last |= zip(ranks, store.multi_get([str(rank) for rank in ranks]), strict=True)
        beats = {rank: Beat.read(data) for rank, data in last.items()}
        failed = {rank: beat for rank, beat in beats.items() if beat.end == "failed"}
        if failed:
            rank, beat = next(iter(failed.items()))
            return _failed(rank, beat)
        if silent:
            return _no_answer({rank: beats[rank] for rank in sorted(silent)}, "any more")
        late = {rank: beat for rank, beat in beats.items() if not beat.end and not beat.waits}
        if late:
            beat = next(iter(late.values()))
            return (
                f"{_named(late)} did not come to an exchange that other ranks waited for: "
                f"{beat.seconds:.0f} s in {beat.where}"
            )
        return None


_ADVICE = "start the same command again to go on from the newest checkpoint"


def _named(beats: dict[int, Beat]) -> str:
    shown = [f"{rank} on {beat.host}" for rank, beat in list(beats.items())[:4]]
    more = f" and {len(beats) - len(shown)} more" if len(beats) > len(shown) else ""
    return f"rank {', '.join(shown)}{more}"


def _failed(rank: int, beat: Beat) -> str:
    return f"rank {rank} on {beat.host} failed: {beat.reason}"


def _no_answer(beats: dict[int, Beat], how_long: str) -> str:
    last = next(iter(beats.values()))
    step = f"after step {last.step}" if last.step else "before the first step"
    return (
        f"{_named(beats)} did not answer {how_long}, last seen {step} in {last.where}: "
        "it was killed or stopped, or its host or the link to it is gone"
    )


def _store_gone(how_long: str) -> str:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"the store of rank 0 at {place} did not answer {how_long}: rank 0 or its launcher has ended, "
        "or its host or the link to it is gone"
    )


def _connect(seconds: float) -> Store:
    """Return a connection of our own to the store at which the ranks met."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return PrefixStore(f"qwenvl/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _within(seconds: float, work: Any) -> Any:
    """Return what `work` returns, or the error that it raises; TimeoutError when it takes too long."""
    answers: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            answers.put(work())
        except Exception as error:
            answers.put(error)

    thread = threading.Thread(target=run, daemon=True)
    # An interpreter that ends under a thread inside the store's C++ aborts the process.
    atexit.register(thread.join, seconds)
    thread.start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return TimeoutError()
