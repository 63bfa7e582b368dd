"""Spawns one command for each byte read and answers with its nanoseconds: see measure.Server.

python3 -I -S spawner.py CHECKOUT COMMAND [ARGUMENT…]
"""

import os
import sys

sys.path.insert(0, sys.argv[1])

from benchmarks.measure import Spawned

spawn = Spawned(sys.argv[2:])
while os.read(0, 1):
    os.write(1, f"{spawn()}\n".encode())
