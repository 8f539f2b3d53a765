"""Whether all keys of a long row differ, found in little memory."""

from __future__ import annotations

import hashlib
from tempfile import TemporaryFile

KEYS_AT_ONCE = 1 << 20  # hashes that are compared in memory


class KeyLog:
    """Hashes of keys, which wait on disk until all are there.

    Two keys that share a hash of 64 bits count as the same: a safe error, once in some thousand rows of 100 million.
    """

    def __init__(self) -> None:
        self.has_gaps, self.count = False, 0
        self._file = TemporaryFile(prefix="qwenvl-dist-")  # noqa: SIM115 (closed with this object)

    def __enter__(self) -> KeyLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: str | None) -> None:
        """Note a key; None for a gap."""
        if key is None:
            self.has_gaps = True
        elif not self.has_gaps:
            self._file.write(hashlib.blake2b(key.encode(), digest_size=8).digest())
            self.count += 1

    def all_differ(self) -> bool:
        """Tell whether there was no gap and no key came twice."""
        import numpy as np

        if self.has_gaps:
            return False
        parts = 1 + self.count // KEYS_AT_ONCE
        for part in range(parts):
            self._file.seek(0)
            mine = [np.zeros(0, np.uint64)]
            while block := self._file.read(8 << 16):
                hashes = np.frombuffer(block, np.uint64)
                mine.append(hashes[hashes % np.uint64(parts) == part])
            hashes = np.concatenate(mine)
            if len(np.unique(hashes)) < len(hashes):
                return False
        return True
