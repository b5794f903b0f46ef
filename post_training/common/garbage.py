"""Python's search for cyclic garbage, switched off while packages are imported. No torch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing is searched for garbage; what exists at its end never is.

    Importing makes a million objects that live as long as the process. Python would search them
    again and again while they become more (a tenth of the imports' time), and in every full
    collection afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
