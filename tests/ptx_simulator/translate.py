"""PTX to C++: a function for each kernel, which the runtime's fibers run.

Statements keep the lines of the kernel's source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import instructions, memory_instructions  # noqa: F401  both fill the table
from .operands import BITS, TYPES, Instruction, Symbols, Unsupported, identifier, immediate
from .table import translate as translate_instruction

RED_ZONE = 32  # bytes between the arrays in shared memory, as in runtime/simulator.h
# the errors of an instruction with an unexpected form
UNKNOWN = (
    Unsupported,
    IndexError,
    KeyError,
    StopIteration,
    ValueError,
)
DYNAMIC_ALIGNMENT = 128  # of dynamic shared memory
DECLARATION = re.compile(
    r"(?P<linkage>(?:\.(?:visible|weak|extern|common)\s+)*)\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$%]+)\s*(?P<dimensions>(?:\[\d*\]\s*)*)(?:=\s*(?P<initial>.*))?$",
    re.S,
)
ENTRY = re.compile(r"(?:\.(?:visible|weak)\s+)*\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\b[^,]*?\s)?([\w$]+)\s*(?:\[(\d+)\])?\s*$", re.S
)
TOOLKIT = re.compile(r"/(?:cuda|nvidia)[^/]*/.*\binclude/")  # paths of CUDA's own headers
# a source position, a label, a brace, or a statement up to its semicolon
TOKEN = re.compile(r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|(?P<statement>[^;]*);)")


@dataclass
class Variable:
    """A declaration such as .shared .align 16 .b8 name[64]."""

    space: str
    alignment: int
    type: str
    name: str
    count: int  # elements; 0 for an array without a size
    initial: str | None

    @property
    def size(self) -> int:
        return self.count * BITS[TYPES[self.type]] // 8

    @classmethod
    def parse(cls, text: str) -> Variable:
        match = DECLARATION.match(text.strip())
        if match is None or match["type"] not in TYPES:
            raise Unsupported(text.strip())
        count = math.prod(int(size or 0) for size in re.findall(r"\[(\d*)\]", match["dimensions"]))
        alignment = int(match["align"] or BITS[TYPES[match["type"]]] // 8)
        return cls(match["space"], alignment, match["type"], match["name"], count, match["initial"])

    def define(self) -> str:
        """Return a global or constant variable as C++."""
        values = ""
        if self.initial is not None:
            bits = BITS[TYPES[self.type]]
            literals = [immediate(value.strip(), bits) for value in self.initial.strip("{} \n\t").split(",")]
            if None in literals:
                raise Unsupported(f"the initial value of {self.name}")
            values = ", ".join(str(literal) for literal in literals)
        element, name = f"u{BITS[TYPES[self.type]]}", identifier("G_", self.name)
        return f"alignas({max(self.alignment, 16)}) static {element} {name}[{max(self.count, 1)}] = {{{values}}};"


class KernelWriter:
    """Writer of one kernel's function and its registration."""

    def __init__(
        self, module: ModuleWriter, number: int, name: str, parameters: str, directives: str, body: str, line: int
    ) -> None:
        self.module = module
        self.number = number
        self.name = name
        self.directives = directives
        self.body = body
        self.first_line = line
        self.symbols = Symbols(addresses=dict(module.addresses))
        self.lines: list[str] = []
        self.shared: list[tuple[int, int]] = []
        self.shared_end = 0
        self.shared_used = 0
        self.at = ""
        self.has_positions = ".loc" in body
        self.callers: dict[tuple[str, ...], tuple[str, ...]] = {}  # the place where the code at a position was inlined
        self.parameter_sizes = self.read_parameters(parameters)

    def read_parameters(self, text: str) -> list[int]:
        sizes = []
        for number, parameter in enumerate(part for part in text.split(",") if part.strip()):
            match = PARAMETER.search(parameter.strip())
            if match is None:
                raise Unsupported(f"parameter {parameter.strip()}")
            sizes.append(BITS[TYPES[match[1]]] // 8 * int(match[3] or 1))
            self.symbols.addresses[match[2]] = f"u64(parameters[{number}])"
        return sizes

    def declare(self, variable: Variable) -> None:
        if variable.space == "shared":
            if variable.count == 0:
                self.symbols.addresses[variable.name] = "dynamic_shared"
                return
            alignment = max(variable.alignment, 16)
            start = -(-self.shared_end // alignment) * alignment
            self.symbols.addresses[variable.name] = f"(shared_memory() + {start})"
            self.shared.append((start, variable.size))
            self.shared_end = start + variable.size + RED_ZONE
            self.shared_used = -(-self.shared_used // variable.alignment) * variable.alignment + variable.size
        elif variable.space == "local":
            name = identifier("V_", variable.name)
            self.lines.append(f"alignas({max(variable.alignment, 16)}) u8 {name}[{variable.size}];")
            self.lines.append(f"memset({name}, 0xff, {variable.size});")
            self.symbols.addresses[variable.name] = f"u64({name})"
        else:
            raise Unsupported(f"{variable.name}, a {variable.space} variable within a kernel")

    def declare_registers(self, text: str) -> None:
        match = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text, re.S)
        if match is None:
            raise Unsupported(text)
        names = []
        for name in match[2].split(","):
            numbered = re.fullmatch(r"([\w$%]+)<(\d+)>", name.strip())
            names += [f"{numbered[1]}{n}" for n in range(int(numbered[2]))] if numbered else [name.strip()]
        c_type = "bool" if match[1] == "pred" else f"u{BITS[TYPES[match[1]]]}"
        self.symbols.registers.update(dict.fromkeys(names, c_type))
        self.lines.append(f"{c_type} {', '.join(identifier('R_', name) for name in names)};")

    def tokens(self) -> Iterator[tuple[str, str, int]]:
        """Yield (kind, text, line of the PTX)."""
        position, line, counted = 0, self.first_line, 0
        while match := TOKEN.match(self.body, position):
            kind = match.lastgroup
            assert kind is not None
            line += self.body.count("\n", counted, match.start(kind))
            counted = match.start(kind)
            yield kind, match[kind].strip(), line
            position = match.end()
        if self.body[position:].strip():
            raise Unsupported(f"{self.name} ends with {self.body[position:].strip()[:50]}")

    def write(self) -> str:
        for label, targets in re.findall(r"([\w$]+):\s*\.branchtargets\s+([^;]*);", self.body):
            self.symbols.branch_targets[label] = [target.strip() for target in targets.split(",")]
        for variable in self.module.shared:
            if re.search(rf"(?<![\w$]){re.escape(variable.name)}(?![\w$])", self.body):
                self.declare(variable)
        for kind, text, line in self.tokens():
            if kind == "loc":
                self.move_to(text)
                continue
            if not self.has_positions:
                self.at = self.module.location(self.module.name, line)
            if kind == "label":
                self.lines.append(f"{identifier('L_', text)}:;")
            elif kind == "brace":
                self.lines.append(text)
            elif text:
                self.statement(re.sub(r"\s+", " ", text))
        return self.finish()

    def move_to(self, text: str) -> None:
        """Move to the position of a .loc.

        A position in CUDA's own headers is replaced by the place of inlining.
        """
        position = tuple(text.replace(",", " ").split()[1:4])
        if caller := re.search(r"inlined_at\s+(\d+)\s+(\d+)\s+(\d+)", text):
            self.callers[position] = caller.groups()
        while position in self.callers and TOOLKIT.search(self.module.files.get(position[0], "")):
            position = self.callers[position]
        file, line, _ = position
        if line == "0":
            return
        path = self.module.files.get(file, "?")
        self.at = self.module.location(Path(path).name, int(line))
        self.lines.append(f"#line {line} {json.dumps(path)}")

    def statement(self, text: str) -> None:
        try:
            if text.startswith(".reg"):
                self.declare_registers(text)
            elif text.startswith((".shared", ".local", ".extern", ".global", ".const")):
                self.declare(Variable.parse(text))
            elif not text.startswith((".pragma", ".branchtargets")):
                self.instruction(text)
        except UNKNOWN as error:
            self.lines.append(self.failure(text, error))

    def instruction(self, text: str) -> None:
        guard = re.match(r"@(!?)\s*([\w$%]+)\s+(.*)", text)
        condition = f"if ({guard[1]}{identifier('R_', guard[2])}) " if guard else ""
        try:
            code = translate_instruction(Instruction(guard[3] if guard else text, self.symbols, self.position))
        except UNKNOWN as error:
            code = self.failure(text, error)
        self.lines.append(f"{condition}{{ {code} }}")

    @property
    def position(self) -> str:
        return self.at or self.module.location(self.module.name, self.first_line)

    def failure(self, text: str, error: Exception) -> str:
        """Return a statement that ends the launch."""
        message = f"the simulator does not support: {text} ({error})".replace("%", "%%")
        return f"fail({self.position}, {json.dumps(message)});"

    def finish(self) -> str:
        number, start = self.number, -(-self.shared_end // DYNAMIC_ALIGNMENT) * DYNAMIC_ALIGNMENT
        largest = re.search(r"\.(maxntid|reqntid)\s+([\d\s,]+)", self.directives)
        threads = math.prod(int(size) for size in largest[2].split(",")) if largest else 0
        sizes = ", ".join(map(str, self.parameter_sizes)) or "0"
        arrays = ", ".join(f"{{{offset}, {size}}}" for offset, size in self.shared) or "{0, 0}"
        exact = str(bool(largest and largest[1] == "reqntid")).lower()
        return "\n".join(
            (
                f"static void kernel_{number}(const u8* const* parameters) {{",
                f"const u64 dynamic_shared = shared_memory() + {start};",
                *self.lines,
                "}",
                f"static const u32 parameter_sizes_{number}[] = {{{sizes}}};",
                f"static const SharedArray shared_arrays_{number}[] = {{{arrays}}};",
                f'static const Kernel record_{number} = {{"{self.name}", kernel_{number}, '
                f"parameter_sizes_{number}, {len(self.parameter_sizes)}, shared_arrays_{number}, {len(self.shared)}, "
                f"{start}, {self.shared_used}, {threads}, {exact}}};",
                f"static const bool registered_{number} = (register_kernel(&record_{number}), true);",
            )
        )


class ModuleWriter:
    """Writer of the C++ of a PTX file."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M))
        # comments go, lines stay
        text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", text)
        self.addresses: dict[str, str] = {}
        self.shared: list[Variable] = []
        self.locations: dict[tuple[str, int], int] = {}

    def location(self, file: str, line: int) -> str:
        return f"locations[{self.locations.setdefault((file, line), len(self.locations))}]"

    def write(self) -> str:
        bodies, outside = self.split()
        definitions = list(self.variables(outside))
        kernels = []
        for number, (name, parameters, directives, body, line) in enumerate(bodies):
            kernels.append(KernelWriter(self, number, name, parameters, directives, body, line).write())
        table = ", ".join(f"{{{json.dumps(file)}, {line}}}" for file, line in self.locations) or '{"", 0}'
        head = ['#include "kernel.h"', "using namespace ptx;", f"static const Location locations[] = {{{table}}};"]
        return "\n".join((*head, *definitions, *kernels)) + "\n"

    def split(self) -> tuple[list[tuple[str, str, str, str, int]], str]:
        """Return the kernels as (name, parameters, directives, body, line), and the text outside of them."""
        kernels, outside, position = [], [], 0
        while match := ENTRY.search(self.text, position):
            outside.append(self.text[position : match.start()])
            depth, end = 1, match.end()
            for brace in re.finditer(r"[{}]", self.text[end:]):
                depth += 1 if brace[0] == "{" else -1
                if depth == 0:
                    position = end + brace.end()
                    break
            body = self.text[end : position - 1]
            kernels.append((match[1], match[2] or "", match[3], body, self.text.count("\n", 0, end) + 1))
        return kernels, "".join((*outside, self.text[position:]))

    def variables(self, text: str) -> Iterator[str]:
        """Yield C++ definitions of the module's variables.

        An instruction that names a variable of another kind is not supported.
        """
        for statement in re.findall(r"^\s*((?:\.\w+\s+)*\.(?:shared|global|const)\s[^;]*);", text, re.M):
            try:
                variable = Variable.parse(statement)
                if variable.space == "shared":
                    self.shared.append(variable)
                else:
                    yield variable.define()
                    self.addresses[variable.name] = f"u64({identifier('G_', variable.name)})"
            except Unsupported:
                continue


def translate(text: str, name: str) -> str:
    """Return the C++ of the PTX ``text``; ``name`` stands for its file if a statement has no source line."""
    return ModuleWriter(text, name).write()
