"""Silence: what compilers say while they work, and nobody asked."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_STATISTICS = "_log_autotune_choices_stats"
_alone = threading.RLock()  # warnings are silenced for all threads; two that overlap would leave them silenced


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's own warnings, one thread at a time; what fails is raised."""
    with _alone, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def silent() -> Iterator[None]:
    """And without the statistics that trying kernels out writes to stderr."""
    with quiet():
        from torch._inductor import select_algorithm  # takes seconds to import

        said = getattr(select_algorithm, _STATISTICS, None)
        try:
            if said is not None:
                setattr(select_algorithm, _STATISTICS, lambda *_, **__: None)
            yield
        finally:
            if said is not None:
                setattr(select_algorithm, _STATISTICS, said)
