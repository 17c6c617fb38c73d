"""The table of instructions: for each opcode a function that writes its C++.

A new opcode goes beside similar ones, in instructions.py or memory_instructions.py. A form such as
"add{,.rn}{.f32,.f64}" stands for one opcode of each choice of the braces. Its arithmetic goes to runtime/, and its test
to tests/test_ptx_instructions.py. That file fails for an opcode of this table that it does not know.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from .operands import Instruction, Unsupported

Handler = Callable[[Instruction], str]
OPCODES: dict[str, Handler] = {}


def expand(form: str) -> list[str]:
    """Return the opcodes that a form stands for."""
    choices = [
        part[1:-1].split(",") if part.startswith("{") else [part] for part in re.findall(r"\{[^}]*\}|[^{}]+", form)
    ]
    return ["".join(choice) for choice in itertools.product(*choices)]


def opcodes(*forms: str) -> Callable[[Handler], Handler]:
    """Enter a function into the table."""

    def enter(handler: Handler) -> Handler:
        for opcode in itertools.chain.from_iterable(map(expand, forms)):
            if opcode in OPCODES:
                raise ValueError(f"{opcode} is in the table twice")
            OPCODES[opcode] = handler
        return handler

    return enter


# Where memory is and how it is cached makes no difference here; `volatile`, `relaxed`, `acquire` and `release` do.
SPACES = {"global", "shared", "shared::cta", "local", "const", "param", "param::entry"}
CACHING = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "noftz", "L1", "L2"}
SCOPES = {"cta", "gpu", "sys"}
MEMORY = {"ld", "st", "atom", "red", "prefetch", "prefetchu"}


def table_name(opcode: str) -> str:
    """Return the opcode without modifiers that make no difference."""
    base, *modifiers = opcode.split(".")
    if base not in MEMORY and not opcode.startswith("cp.async"):
        return opcode
    kept = [
        part for part in modifiers if part not in SPACES | CACHING | SCOPES and not part.startswith(("L1::", "L2::"))
    ]
    return ".".join((base, *kept))


def translate(instruction: Instruction) -> str:
    """Return C++ statements for an instruction."""
    handler = OPCODES.get(table_name(instruction.opcode))
    if handler is None:
        raise Unsupported(instruction.opcode)
    return handler(instruction)
