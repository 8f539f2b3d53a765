"""What a process sets for itself before it joins the others."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

HELD_AFTER_FREEING = """
import ctypes, sys
from pathlib import Path
from qwenvl_dist.distributed import return_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def block(nbytes):
    address = library.malloc(nbytes)
    ctypes.memset(address, 1, nbytes)
    return address

def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20

if sys.argv[1] == "yes":
    return_freed_memory()
library.free(block(24 << 20))  # from now on glibc keeps smaller blocks in its heap
before = resident_mib()
weights, small = [block(20 << 20) for _ in range(8)], block(100_000)  # the small one keeps the heap's end in use
for weight in weights:
    library.free(weight)
print(resident_mib() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(), reason="a property of glibc"
)
def test_freed_weights_go_back_to_the_system() -> None:
    def held(returned: str) -> float:
        command = [sys.executable, "-c", HELD_AFTER_FREEING, returned]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert held("yes") < 10
    assert held("no") > 100  # or the setting has become needless
