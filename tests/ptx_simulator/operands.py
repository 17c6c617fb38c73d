"""One PTX instruction: its opcode, and its operands as C++ expressions."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

# the C++ type of values that an instruction of a PTX type computes with
TYPES = {
    **{f"{kind}{bits}": f"{'s' if kind == 's' else 'u'}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)},
    **{name: name for name in ("f16", "bf16", "f32", "f64")},
    "b128": "u128",
    "f16x2": "u32",
    "bf16x2": "u32",
    "f32x2": "u64",
    "pred": "bool",
}
BITS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64, "u128": 128, "s8": 8, "s16": 16, "s32": 32, "s64": 64, "bool": 1}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
FLOATS = {"f32": "float", "f64": "double"}
BIT_TYPES = {"u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", *FLOATS}  # all but the types of the runtime's own
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
DIRECTIONS = {"rn": "FE_TONEAREST", "rz": "FE_TOWARDZERO", "rm": "FE_DOWNWARD", "rp": "FE_UPWARD"}

SPECIAL_REGISTERS = {
    **{f"%tid.{axis}": f"current->thread.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"current->block_size.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"current->block.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"current->grid_size.{axis}" for axis in "xyz"},
    "%laneid": "current->lane",
    "%warpid": "current->warp",
    "%lanemask_eq": "(1u << current->lane)",
    "%lanemask_lt": "((1u << current->lane) - 1)",
    "%lanemask_le": "((2u << current->lane) - 1)",
    "%lanemask_gt": "(0u - (2u << current->lane))",
    "%lanemask_ge": "(0u - (1u << current->lane))",
    "%dynamic_smem_size": "current->dynamic_shared_bytes",
    "WARP_SZ": "32u",
}


class Unsupported(Exception):
    """An instruction that the simulator does not know; a launch that reaches it fails."""


@dataclass
class Symbols:
    """The names within a kernel: registers with their C++ types, and the C++ expressions of addresses."""

    registers: dict[str, str] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)  # by the label of their list


def identifier(prefix: str, name: str) -> str:
    """Return a C++ name for a PTX name."""
    return prefix + re.sub(r"\W", "_", name.replace("$", "_S").removeprefix("%"))


def immediate(text: str, bits: int) -> str | None:
    """Return the bits of a constant, as a C++ literal; None if the text is not a constant."""
    suffix = "ull" if bits > 32 else "u"
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        return f"0x{match[1]}u" if match[1] else f"0x{match[2]}ull"
    if re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", text):
        layout, code = ("<d", "<Q") if bits == 64 else ("<f", "<I")
        return f"{hex(struct.unpack(code, struct.pack(layout, float(text)))[0])}{suffix}"
    if match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|0[bB][01]+|\d+)U?", text):
        digits = match[2]
        base = 8 if re.fullmatch(r"0[0-7]+", digits) else 0
        number = int(digits, base) * (-1 if match[1] else 1)
        return f"{hex(number % (1 << bits))}{suffix}" if bits > 1 else str(int(number != 0))
    return None


def cast(c_type: str, bits: str) -> str:
    """Return ``bits``, an unsigned integer of the same size, as a value of ``c_type``."""
    if c_type in FLOATS:
        return f"bits_{FLOATS[c_type]}({bits})"
    return bits if c_type[0] == "u" else f"{c_type}({bits})"


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets; {a} is a."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,{}\[\]()])+", text)
    stripped = (part.strip() for part in parts)
    return [re.sub(r"^\{\s*([^,{}]+?)\s*\}$", r"\1", part) for part in stripped if part]


class Instruction:
    """An instruction without its guard; ``at`` is the C++ expression of its source location."""

    def __init__(self, text: str, symbols: Symbols, at: str) -> None:
        match = re.match(r"([a-z][\w.:]*)\s*(.*)", text, re.S)
        if match is None:
            raise Unsupported(text)
        self.opcode = match[1]
        self.parts = self.opcode.split(".")
        self.operands = split_operands(match[2])
        self.symbols = symbols
        self.at = at

    @property
    def type(self) -> str:
        """Return the last of the types in the opcode."""
        return next(part for part in reversed(self.parts) if part in TYPES)

    @property
    def c_type(self) -> str:
        return TYPES[self.type]

    @property
    def direction(self) -> str:
        return next((DIRECTIONS[part] for part in self.parts if part in DIRECTIONS), "FE_TONEAREST")

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.parts for modifier in modifiers)

    def raw(self, operand: str, c_type: str) -> str:
        """Return the bits of an operand, which an instruction reads as ``c_type``."""
        if operand.startswith("!"):
            return f"(!{self.raw(operand[1:].strip(), c_type)})"
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        if operand in self.symbols.registers:
            return identifier("R_", operand)
        literal = immediate(operand, BITS[c_type])
        if literal is not None:
            return literal
        base, _, offset = (part.strip() for part in operand.partition("+"))
        if base in self.symbols.addresses:
            return f"({self.symbols.addresses[base]} + {offset})" if offset else self.symbols.addresses[base]
        raise Unsupported(operand)

    def read(self, operand: str, c_type: str) -> str:
        """Return an operand's value.

        Plain C++ takes g++ half the time of a call of as() or raw(), of which a kernel has tens of thousands.
        """
        raw = self.raw(operand, c_type)
        if c_type == "bool":
            return raw
        if raw[0].isdigit() and c_type in BIT_TYPES:
            return cast(c_type, f"u{BITS[c_type]}({raw})")
        if self.symbols.registers.get(operand) == f"u{BITS[c_type]}" and c_type in BIT_TYPES:
            return cast(c_type, raw)
        return f"as<{c_type}>({raw})"

    def value(self, index: int, ptx_type: str | None = None) -> str:
        return self.read(self.operands[index], TYPES[ptx_type or self.type])

    def values(self, first: int = 1, ptx_type: str | None = None) -> list[str]:
        return [self.value(index, ptx_type) for index in range(first, len(self.operands))]

    def address(self, index: int) -> str:
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", self.operands[index])
        if match is None:
            raise Unsupported(self.operands[index])
        base = self.raw(match[1], "u64")
        return f"(u64({base}) + u64({int(match[2], 0)}))" if match[2] else f"u64({base})"

    def elements(self, index: int) -> list[str]:
        """Return the operands within {...}, or the one that stands alone."""
        return [element.strip() for element in self.operands[index].strip("{}").split(",")]

    def write(self, target: str, expression: str, c_type: str = "") -> str:
        """Assign to a register; ``c_type`` is the type of the expression, where it is known."""
        if target == "_":
            return f"(void)({expression});"
        if target not in self.symbols.registers:
            raise Unsupported(f"{target} as a target")
        bits = f"raw({expression})"
        if c_type in FLOATS:
            bits = f"{FLOATS[c_type]}_bits({expression})"
        elif c_type in BIT_TYPES or c_type == "bool":
            bits = expression
        return f"{identifier('R_', target)} = {bits};"

    def set(self, expression: str, c_type: str = "") -> str:
        """Assign to the first operand."""
        return self.write(self.operands[0], expression, c_type)
