"""Imported once by the server that workers are forked from: what each of them would otherwise
import by itself.

Imports only: no thread of torch may run when a process forks.
"""

from __future__ import annotations

import gc
from importlib import import_module

from kdexp.environment import remember_code
from kdexp.workers import pool as pool

LATE = ("torch._inductor.config",)  # which torch imports when it first compiles

for name in LATE:
    import_module(name)
remember_code()
gc.freeze()  # what is there now stays, in memory that all workers share
