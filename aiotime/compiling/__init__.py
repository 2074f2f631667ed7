"""Compiled stages: a stage's module as a program that costs less than calling its layers one by one.

    module ──▶ exported ──▶ package (C++, cached on disk) ──▶ library (called without Python's lock)      "aot"
           └─▶ torch.compile ──▶ jit, learning too                                                        "inductor"
           └─▶ graph: captured once, replayed                                                             "cudagraph"

choice      which way a stage goes, by measurement ("auto")
program     what they all are: a callable that follows its module's weights
"""

from __future__ import annotations

from aiotime.compiling.choice import Outcome, compile_module
from aiotime.compiling.program import WAYS, CompileError, Program, check_way

__all__ = ["WAYS", "CompileError", "Outcome", "Program", "check_way", "compile_module"]
