"""Runs /bin/true by a `Sandbox` for each byte read, and answers with its nanoseconds.

    python3 -I -S sandbox_rounds.py CHECKOUT BUNDLE

With `m`: the resident kilobytes of this process, of the warm process and all its children.
"""

import glob
import os
import sys

sys.path.insert(0, sys.argv[1])
# What the warm process needs besides is found where the virtual environment has it.
sys.path += glob.glob(f"{sys.argv[1]}/.venv/lib/python3*/site-packages")

from time import perf_counter_ns as now

import sandboxfs
from sandboxfs.harness import client

with sandboxfs.Sandbox(sys.argv[2]) as box:
    while os.read(0, 1):
        started = now()
        box.run(["/bin/true"], check=True)
        os.write(1, f"{now() - started}\n".encode())
client.stop()
