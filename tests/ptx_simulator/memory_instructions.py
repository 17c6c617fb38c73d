"""Instructions that move data, communicate between threads, or control the flow."""

from __future__ import annotations

from .operands import BITS, PACKED, TYPES, Instruction, Unsupported, identifier
from .table import opcodes

LOADED = "{" + ",".join(f".{name}" for name in TYPES if name not in ("pred", "b128", *PACKED)) + "}"

# ---- registers


@opcodes("mov{.pred,.b16,.b32,.b64,.u16,.u32,.u64,.s16,.s32,.s64,.f16,.bf16,.f32,.f64}")
def move(i: Instruction) -> str:
    targets, sources = i.elements(0), i.elements(1)
    bits = BITS[i.c_type]
    if len(targets) > 1:
        part = f"u{bits // len(targets)}"
        assignments = [
            i.write(target, f"{part}(whole >> {bits // len(targets) * n})") for n, target in enumerate(targets)
        ]
        return f"const u{bits} whole = {i.value(1, f'b{bits}')}; " + " ".join(assignments)
    if len(sources) > 1:
        part = f"u{bits // len(sources)}"
        return i.set(
            " | ".join(
                f"u{bits}({i.read(source, part)}) << {bits // len(sources) * n}" for n, source in enumerate(sources)
            )
        )
    # the same bits, whatever the type
    return i.set(i.value(1)) if i.type == "pred" else i.set(i.value(1, f"b{bits}"), f"u{bits}")


@opcodes("cvta{,.to}{.global,.shared,.local,.const,.param}{.u32,.u64}")
def convert_address(i: Instruction) -> str:
    return i.set(i.value(1))


@opcodes("createpolicy.fractional{.L2::evict_last,.L2::evict_normal,.L2::evict_first,.L2::evict_unchanged}.b64")
def cache_policy(i: Instruction) -> str:
    return i.set("u64(0)")


# ---- memory


def drop_cache_policy(i: Instruction) -> None:
    if i.has("L2::cache_hint"):
        i.operands.pop()


def fences(i: Instruction) -> tuple[str, str]:
    """Return the fences before and after an access."""
    return "fence(); " * i.has("release", "acq_rel"), " fence();" * i.has("acquire", "acq_rel")


@opcodes(f"ld{{,.v2,.v4,.v8}}{LOADED}", f"ld{{.volatile,.relaxed,.acquire}}{LOADED}")
def load(i: Instruction) -> str:
    drop_cache_policy(i)
    address, targets = i.address(1), i.elements(0)
    if i.has("volatile", "relaxed", "acquire"):
        return i.set(f"load_relaxed<{i.c_type}>({address}, {i.at})") + fences(i)[1]
    if not i.has("v2", "v4", "v8"):
        return i.set(f"load<{i.c_type}>({address}, {i.at})", i.c_type)
    assignments = [i.write(target, f"loaded.element[{n}]", i.c_type) for n, target in enumerate(targets)]
    return f"const auto loaded = load_vector<{i.c_type}, {len(targets)}>({address}, {i.at}); " + " ".join(assignments)


@opcodes(f"st{{,.v2,.v4,.v8}}{LOADED}", f"st{{.volatile,.relaxed,.release}}{LOADED}")
def store(i: Instruction) -> str:
    drop_cache_policy(i)
    address, values = i.address(0), [i.read(element, i.c_type) for element in i.elements(1)]
    if i.has("volatile", "relaxed", "release"):
        return fences(i)[0] + f"store_relaxed<{i.c_type}>({address}, {values[0]}, {i.at});"
    if not i.has("v2", "v4", "v8"):
        return f"store<{i.c_type}>({address}, {values[0]}, {i.at});"
    return f"store_vector<{i.c_type}, {len(values)}>({address}, {{{', '.join(values)}}}, {i.at});"


ATOMIC_TYPES = {
    "add": "{.u32,.s32,.u64,.f32,.f64,.f16,.bf16,.f16x2,.bf16x2}",
    "min": "{.u32,.s32,.u64,.s64}",
    "max": "{.u32,.s32,.u64,.s64}",
    "inc": ".u32",
    "dec": ".u32",
    "and": "{.b32,.b64}",
    "or": "{.b32,.b64}",
    "xor": "{.b32,.b64}",
}
ORDERS = "{,.relaxed,.acquire,.release,.acq_rel}"
UPDATES = {
    "add": "add(old, operand)",
    "min": "minimum(old, operand)",
    "max": "maximum(old, operand)",
    "inc": "increment_wrapping(old, operand)",
    "dec": "decrement_wrapping(old, operand)",
    "and": "old & operand",
    "or": "old | operand",
    "xor": "old ^ operand",
    "exch": "operand",
    "cas": "old == operand ? replacement : old",
}


@opcodes(f"atom{ORDERS}.exch{{.b32,.b64}}", f"atom{ORDERS}.cas{{.b16,.b32,.b64}}")
@opcodes(*(f"{base}{ORDERS}.{name}{types}" for base in ("atom", "red") for name, types in ATOMIC_TYPES.items()))
def atomic(i: Instruction) -> str:
    drop_cache_policy(i)
    first = 1 if i.parts[0] == "atom" else 0
    name = next(part for part in i.parts if part in UPDATES)
    update = UPDATES[name]
    if i.type in PACKED:
        element = PACKED[i.type]
        update = f"packed<{element}>([]({element} a, {element} b) {{ return add(a, b); }}, old, operand)"
    statements = f"const auto operand = {i.value(first + 1)}; "
    if name == "cas":
        statements += f"const auto replacement = {i.value(first + 2)}; "
    before, after = fences(i)
    call = f"atomic<{i.c_type}>({i.address(first)}, {i.at}, [=]({i.c_type} old) {{ return {update}; }})"
    return f"{statements}{before}{i.set(call) if first else call + ';'}{after}"


@opcodes("cp.async")
def copy_async(i: Instruction) -> str:
    drop_cache_policy(i)
    size = int(i.operands[2], 0)
    if size not in (4, 8, 16):
        raise Unsupported(f"{i.opcode} of {size} bytes")
    source_size = i.value(3, "u32") if len(i.operands) > 3 else f"{size}u"
    return f"copy_async({i.address(0)}, {i.address(1)}, {size}, {source_size}, {i.at});"


@opcodes("cp.async.commit_group")
def commit_copies(i: Instruction) -> str:
    return "commit_copies();"


@opcodes("cp.async.wait_group", "cp.async.wait_all")
def wait_for_copies(i: Instruction) -> str:
    return f"wait_for_copies({i.value(0, 'u32')});" if i.operands else "commit_copies(); wait_for_copies(0);"


# ---- other threads


@opcodes("shfl.sync{.up,.down,.bfly,.idx}.b32")
def shuffle(i: Instruction) -> str:
    mode = {"up": "up", "down": "down", "bfly": "butterfly", "idx": "index"}[i.parts[2]]
    first, _, second = (name.strip() for name in i.operands[0].partition("|"))
    call = f"shuffle(WarpOperation::shuffle_{mode}, {', '.join(i.values())}, {i.at})"
    return f"const auto result = {call}; {i.write(first, 'result.value', 'u32')}" + (
        f" {i.write(second, 'result.in_range', 'bool')}" if second else ""
    )


@opcodes("vote.sync{.all,.any,.uni}.pred", "vote.sync.ballot.b32")
def vote(i: Instruction) -> str:
    tests = {"all": "votes == mask", "any": "votes != 0", "uni": "votes == mask || votes == 0", "ballot": "votes"}
    mask = i.value(2, "u32")
    votes = f"const u32 mask = {mask}, votes = ballot({i.value(1, 'pred')}, mask, {i.at});"
    return f"{votes} {i.set(tests[i.parts[2]])}"


@opcodes("redux.sync{.add,.min,.max}{.u32,.s32}", "redux.sync{.and,.or,.xor}.b32")
def reduce(i: Instruction) -> str:
    update = UPDATES[i.parts[2]]
    operation = f"[]({i.c_type} old, {i.c_type} operand) {{ return {update}; }}"
    return i.set(f"reduce_warp<{i.c_type}>({i.value(1)}, {i.value(2, 'u32')}, {i.at}, {operation})")


@opcodes("ldmatrix.sync.aligned.m8n8{.x1,.x2,.x4}{,.trans}{.shared,.shared::cta}.b16")
def load_matrix(i: Instruction) -> str:
    targets = i.elements(0)
    assignments = " ".join(i.write(target, f"matrices.element[{n}]") for n, target in enumerate(targets))
    call = f"load_matrix<{len(targets)}, {str(i.has('trans')).lower()}>({i.address(1)}, {i.at})"
    return f"const auto matrices = {call}; {assignments}"


@opcodes("stmatrix.sync.aligned.m8n8{.x1,.x2,.x4}{,.trans}{.shared,.shared::cta}.b16")
def store_matrix(i: Instruction) -> str:
    values = [i.read(element, "u32") for element in i.elements(1)]
    template = f"{len(values)}, {str(i.has('trans')).lower()}"
    return f"store_matrix<{template}>({i.address(0)}, {{{', '.join(values)}}}, {i.at});"


@opcodes("bar.warp.sync")
def synchronize_warp(i: Instruction) -> str:
    return f"u32 values[32]; exchange({i.value(0, 'u32')}, WarpOperation::synchronize, 0, {i.at}, values);"


def barrier_and_count(i: Instruction, first: int, last: int) -> str:
    """Return the barrier's number, and its number of threads if given."""
    count = i.value(first + 1, "u32") if last > first + 1 else "all_threads"
    return f"{i.value(first, 'u32')}, {count}"


@opcodes("{bar,barrier}{,.cta}.sync{,.aligned}")
def barrier(i: Instruction) -> str:
    return f"barrier({barrier_and_count(i, 0, len(i.operands))}, {i.at});"


@opcodes("{bar,barrier}{,.cta}.arrive{,.aligned}")
def barrier_arrive(i: Instruction) -> str:
    return f"barrier_arrive({barrier_and_count(i, 0, len(i.operands))}, {i.at});"


@opcodes("{bar,barrier}{,.cta}.red{.and,.or}{,.aligned}.pred", "{bar,barrier}{,.cta}.red.popc{,.aligned}.u32")
def barrier_reduce(i: Instruction) -> str:
    reduction = "any" if i.has("or") else "all" if i.has("and") else "count"
    last = len(i.operands) - 1
    vote = i.value(last, "pred")
    return i.set(f"barrier_reduce({barrier_and_count(i, 1, last)}, Reduction::{reduction}, {vote}, {i.at})")


@opcodes("membar{.cta,.gl,.sys}", "fence{,.sc,.acq_rel}{.cta,.gpu,.sys}")
def fence(i: Instruction) -> str:
    return "fence();"


# ---- control


@opcodes("bra{,.uni}")
def branch(i: Instruction) -> str:
    return f"goto {identifier('L_', i.operands[0])};"


@opcodes("brx.idx{,.uni}")
def branch_by_index(i: Instruction) -> str:
    cases = "".join(
        f"case {n}: goto {identifier('L_', label)}; " for n, label in enumerate(i.symbols.branch_targets[i.operands[1]])
    )
    return f'switch ({i.value(0, "u32")}) {{ {cases}default: fail({i.at}, "brx.idx beyond its targets"); }}'


@opcodes("{ret,exit}", "ret.uni")
def end(i: Instruction) -> str:
    return "return;"


@opcodes("trap")
def trap(i: Instruction) -> str:
    return f'fail({i.at}, "trap");'


# hints, which change the time of an access but not its result
@opcodes("prefetch{,u}", "nanosleep.u32", "griddepcontrol{.wait,.launch_dependents}")
def nothing(i: Instruction) -> str:
    return ";"
