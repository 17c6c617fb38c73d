"""Builds depthlstm_fast/_C.abi3.so with the C++ compiler, nvcc where there is one, and ninja.

The library uses PyTorch's stable ABI only and is loaded by torch.ops.load_library: it is no Python extension module, so one
binary serves every Python and every torch from 2.11 on, CUDA's run-time library inside. Kernel sources (csrc/cpu, csrc/cuda) see
neither torch nor Python; a source named *_kernel.cpp is compiled once per instruction set, one named *_kernel.cu once per dtype of z.
ninja makes rebuilds incremental (the objects stay in build/).

    python setup.py build_ext --inplace    the library, into depthlstm_fast/
    python setup.py build_internals        tests/_internals.*.so: csrc/testing.cpp, a pybind11 module for the tests only
    python setup.py build_smoke            build/*/smoke: tests/cpp/smoke.cpp, the kernels without Python and torch

Environment: CXX, MAX_JOBS, DEPTHLSTM_SANITIZE=address,undefined (own build folder, no CUDA), DEPTHLSTM_TESTING=1 (build_ext builds
the internals too), DEPTHLSTM_NO_EXTENSION=1 (install the pure PyTorch part only), CUDA_HOME (else nvcc of PATH, else /usr/local/cuda),
DEPTHLSTM_CUDA=0 (no CUDA kernels), DEPTHLSTM_CUDA_ARCHS="80;90;120-ptx" (machine code for GPUs of compute capability 8.0 and 9.0, PTX
for 12.0 and what comes after it).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)  # type: ignore[union-attr]
TORCH_FLOOR = (2, 11)
TORCH_TARGET = "0x020b000000000000ULL"  # the stable ABI of 2.11: newer headers then bind no newer symbol
TORCH_INSTALL = "pip install torch==2.13.0"
LIBRARY = "_C.abi3.so"
FAILURE_FILE = ROOT / "depthlstm_fast" / "_C.build_failed.txt"  # read by `python -m depthlstm_fast`

COMMON_FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"),
    # errno and trap flags block vectorisation; NaN and infinity keep their meaning, so -ffast-math is out.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]
AVX512_FLAGS = [
    # xsimd wants CD beside DQ; gcc 12 warns of its own _mm512_undefined_ps.
    *("-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
ISA_FLAGS = {
    "generic": ["-march=x86-64"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}
CUDA_ARCHS = ["80", "90", "100", "120-ptx"]
CUDA_DTYPES = ["float", "bfloat16", "float16"]
NVCC_FLOOR = (12, 0)  # the first that knows C++20
NVCC_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
CUDA_LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]  # the shared run-time library would break the import on a CPU torch


def fail(message: str) -> NoReturn:
    """Ends the build with one readable line instead of a traceback, and keeps it for the report command."""
    text = f"depthlstm_fast: {message}"
    FAILURE_FILE.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(f"\nerror: {text}\n")


def isas() -> dict[str, list[str]]:
    if sanitizers():  # a minute a set; the others differ in vector instructions alone and meet guard pages in tests/cpp/smoke.cpp
        return {"generic": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ISA_FLAGS
    return {"generic": []}


def find_torch() -> tuple[Path, str]:
    """The folder and version of the installed torch, which is not imported (an isolated build cannot)."""
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates += list(spec.submodule_search_locations)
    # Inside pip's isolated build these still point at the target environment.
    candidates += [os.path.join(sysconfig.get_paths()[key], "torch") for key in ("purelib", "platlib")]
    for folder in map(Path, candidates):
        if not (folder / "version.py").is_file() or not (folder / "include" / "torch").is_dir():
            continue
        found = re.search(r"""__version__ = ['"](.+?)['"]""", (folder / "version.py").read_text(encoding="utf-8"))
        version = found.group(1) if found else "0.0"
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers < TORCH_FLOOR:
            fail(f"torch {version} in {folder} is too old, 2.11 or newer is needed. Run: {TORCH_INSTALL}")
        return folder, version
    fail(f"torch is not installed for {sys.executable}. Run: {TORCH_INSTALL} && pip install --no-build-isolation .")


def find_compiler() -> tuple[str, str]:
    """The C++ compiler and the first line it says about itself; it must know C++20."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "c++", "clang++"]
    compiler = next((name for name in names if shutil.which(name.split()[0])), None)
    if compiler is None:
        fail(f"no C++ compiler found (looked for {', '.join(names)}). Install one (Debian, Ubuntu: apt-get install g++) or set CXX.")
    about = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    identity = about[0] if about else compiler
    probe = "#include <bit>\n#include <concepts>\ntemplate <std::integral T> T f(T x) { return x; }\nint main() { return f(0); }\n"
    command = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), "no reason given")
        fail(f"{identity} cannot compile C++20 ({reason.strip()}). Install g++ 11 or newer, or set CXX to one.")
    return compiler, identity


class Nvcc(NamedTuple):
    path: str
    version: str
    archs: list[str]
    library_folders: list[str]


def find_nvcc() -> Nvcc | str:
    """nvcc and what it is to compile for, or the reason why the library is built without CUDA."""
    if os.environ.get("DEPTHLSTM_CUDA") == "0":
        return "DEPTHLSTM_CUDA=0"
    places = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDA_HOME"):
        places.insert(0, os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    path = next(filter(None, map(shutil.which, places)), None)
    if path is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"

    def ask(*words: str) -> str:
        # nvcc writes its dry run to the standard error
        return subprocess.run([path, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout

    version = re.search(r"release [\d.]+, V([\d.]+)", ask("--version"))
    if version is None:
        return f"{path} --version names no release"
    if tuple(map(int, version.group(1).split(".")))[:2] < NVCC_FLOOR:
        return f"nvcc {version.group(1)} is too old, 12.0 or newer is needed"
    archs = cuda_archs(version.group(1), set((ask("--list-gpu-code") + ask("--list-gpu-arch")).split()))
    # asked for, not guessed: the nvcc on PATH may be a script that lies elsewhere
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", ask("--dryrun", "-x", "cu", os.devnull, "-o", "unused"), re.M)
    folders = [word.removeprefix("-L") for word in shlex.split(libraries.group(1) if libraries else "") if word.startswith("-L")]
    return Nvcc(path, version.group(1), archs, folders)


def cuda_archs(version: str, known: set[str]) -> list[str]:
    """DEPTHLSTM_CUDA_ARCHS, else of CUDA_ARCHS those that this nvcc knows; "80" is machine code, "80-ptx" PTX."""
    wanted = re.findall(r"[^\s;,]+", os.environ.get("DEPTHLSTM_CUDA_ARCHS", ""))
    unknown = []
    for arch in wanted or CUDA_ARCHS:
        form = re.fullmatch(r"(\d+)(-ptx)?", arch)
        if form is None or int(form.group(1)) < 80:
            fail(
                f'DEPTHLSTM_CUDA_ARCHS must list compute capabilities from 8.0 on, without their dot, as in "80;90;120-ptx"; found {arch!r}'
            )
        if ("compute_" if form.group(2) else "sm_") + form.group(1) not in known:
            unknown.append(arch)
    if wanted and unknown:
        fail(f"nvcc {version} does not know {', '.join(unknown)} of DEPTHLSTM_CUDA_ARCHS; it knows {', '.join(sorted(known))}")
    if unknown:
        print(f"depthlstm_fast: nvcc {version} does not know {', '.join(unknown)}, which the CUDA kernels are then not compiled for")
    return list(dict.fromkeys(wanted)) or [arch for arch in CUDA_ARCHS if arch not in unknown]


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("-ptx")
    return ["-gencode", f"arch=compute_{number},code={'compute' if arch.endswith('-ptx') else 'sm'}_{number}"]


def find_ninja() -> str:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        local = Path(ninja.BIN_DIR) / "ninja"
        if local.is_file():
            return str(local)
    found = shutil.which("ninja") or shutil.which("ninja-build")
    if found is None:
        fail("ninja is not installed. Run: pip install ninja")
    return found


def sanitizers() -> str:
    return ",".join(part.strip() for part in os.environ.get("DEPTHLSTM_SANITIZE", "").split(",") if part.strip())


class NinjaBuild:
    """Writes build.ninja for the requested target and runs it."""

    def __init__(self) -> None:
        self.compiler, self.identity = find_compiler()
        self.ninja = find_ninja()
        self.sanitize = sanitizers()
        self.nvcc: Nvcc | str = "not part of this target"
        self.changed = False
        name = "ninja" + ("-" + self.sanitize.replace(",", "-") if self.sanitize else "")
        self.folder = ROOT / "build" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        # messages name the sources as the repository does, whatever folder they were built in
        self.includes = [f"-ffile-prefix-map={ROOT}/=", f"-I{ROOT / 'csrc'}", "-isystem", str(ROOT / "third_party" / "xsimd" / "include")]
        # gcc spells the limit differently from clang; a template error floods the terminal without one.
        self.limit_flags = ["-ferror-limit=5"] if "clang" in self.identity else ["-fmax-errors=5"]
        self.sanitize_flags: list[str] = []
        if self.sanitize:
            # -O1, placed after -O3: instrumented vector code takes minutes to optimise further.
            self.sanitize_flags = [
                "-O1",
                "-g1",
                f"-fsanitize={self.sanitize}",
                "--param",
                "asan-stack=0",
                "-DDEPTHLSTM_SANITIZED",
                "-fno-omit-frame-pointer",
                "-fno-sanitize-recover=all",
            ]

    def cpu_units(self) -> list[tuple[str, Path, list[str]]]:
        """(object, source, flags) of everything in csrc/cpu."""
        units = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernel"):
                for isa, flags in isas().items():
                    units.append((f"{source.stem}.{isa}.o", source, [*flags, f"-DDEPTHLSTM_ISA={isa}", f"-DDEPTHLSTM_ISA_{isa.upper()}=1"]))
            else:
                units.append((f"{source.stem}.o", source, isas()["generic"]))
        if not units:
            fail(f"no C++ sources in {ROOT / 'csrc' / 'cpu'}: the source tree is incomplete")
        return units

    def cuda_units(self, nvcc: Nvcc) -> list[tuple[str, Path, list[str]]]:
        """(object, source, flags) of everything in csrc/cuda."""
        common = [flag for arch in nvcc.archs for flag in gencode(arch)]
        if os.environ.get("CXX") and len(self.compiler.split()) == 1:  # nvcc takes no "ccache g++"
            common += ["-ccbin", self.compiler]
        units = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            if source.stem.endswith("_kernel"):
                for z in CUDA_DTYPES:
                    units.append((f"cuda/{source.stem}.{z}.o", source, [*common, f"-DDEPTHLSTM_Z={z}", f"-DDEPTHLSTM_Z_{z.upper()}=1"]))
            else:
                units.append((f"cuda/{source.stem}.o", source, common))
        if not units:
            fail(f"no CUDA sources in {ROOT / 'csrc' / 'cuda'}: the source tree is incomplete; DEPTHLSTM_CUDA=0 builds without them")
        return units

    def library(self) -> Path:
        torch_folder, torch_version = find_torch()
        self.nvcc = "a build with sanitizers is without CUDA" if self.sanitize else find_nvcc()
        cuda, nvcc = (",".join(self.nvcc.archs), self.nvcc.version) if isinstance(self.nvcc, Nvcc) else ("none", self.nvcc)
        compiler, nvcc = (re.sub(r"[;'\"\\]", " ", text) for text in (self.identity, nvcc))
        stamp = f"depthlstm_fast build: version={VERSION};compiler={compiler};torch={torch_version};isa={','.join(isas())}"
        stamp += f";sanitize={self.sanitize or 'none'};cuda={cuda};nvcc={nvcc}"
        headers = [
            "-isystem",
            str(torch_folder / "include"),
            "-isystem",
            str(torch_folder / "include" / "torch" / "csrc" / "api" / "include"),
        ]
        flags = [*isas()["generic"], *headers, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f'-DDEPTHLSTM_BUILD_INFO="{stamp}"']
        units = [*self.cpu_units(), ("torch_ops.o", ROOT / "csrc" / "ops.cpp", flags)]
        # --no-as-needed: the linker would drop libtorch.so, whose loading is what makes torch's symbols available.
        link = ["-shared", f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        link += ["-Wl,--exclude-libs,ALL", "-Wl,-z,relro,-z,now"]
        if not self.sanitize:
            link += ["-Wl,--no-undefined", f"-Wl,-rpath-link,{torch_folder / 'lib'}"]
        if isinstance(self.nvcc, Nvcc):
            cuda_flags = [*flags, f'-DDEPTHLSTM_CUDA_ARCHS="{cuda}"']
            units += [*self.cuda_units(self.nvcc), ("torch_cuda_ops.o", ROOT / "csrc" / "cuda_ops.cpp", cuda_flags)]
            link += [*(f"-L{folder}" for folder in self.nvcc.library_folders), *CUDA_LINK]
        return self.run(LIBRARY, units, link)

    def internals(self) -> Path | None:
        source = ROOT / "csrc" / "testing.cpp"
        if not source.is_file():
            print("depthlstm_fast: csrc/testing.cpp is absent, nothing to build for the tests")
            return None
        if importlib.util.find_spec("pybind11") is None:
            fail("pybind11 is not installed, the tests' internals need it. Run: pip install pybind11")
        import pybind11

        flags = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
        name = "_internals" + str(sysconfig.get_config_var("EXT_SUFFIX"))
        return self.run(name, [*self.cpu_units(), (f"testing.{sys.implementation.cache_tag}.o", source, flags)], ["-shared"])

    def smoke(self) -> Path | None:
        source = ROOT / "tests" / "cpp" / "smoke.cpp"
        if not source.is_file():
            print("depthlstm_fast: tests/cpp/smoke.cpp is absent, nothing to build")
            return None
        return self.run("smoke", [*self.cpu_units(), ("smoke.o", source, isas()["generic"])], ["-pthread"])

    def run(self, target: str, units: list[tuple[str, Path, list[str]]], link_flags: list[str]) -> Path:
        def quote(words: list[str]) -> str:
            # One shell (single quotes around what needs them), then ninja's own escape.
            return " ".join(w if re.fullmatch(r"[\w@%+=:,./-]+", w) else f"'{w}'" for w in words).replace("$", "$$")

        def path(value: Path | str) -> str:
            return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        flags = quote([*COMMON_FLAGS, *self.limit_flags, *self.sanitize_flags, *self.includes])
        cuda_rule = []
        if isinstance(self.nvcc, Nvcc):
            cuda_rule = [
                "rule cuda",
                f"  command = {quote([self.nvcc.path, *NVCC_FLAGS])} $flags -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = compile $out",
            ]
        lines = [
            "rule compile",
            f"  command = {self.compiler} {flags} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            *cuda_rule,
            "rule link",
            f"  command = {self.compiler} -o $out $in {quote([*self.sanitize_flags, *link_flags])}",
            "  description = link $out",
        ]
        for name, source, unit_flags in units:
            rule = "cuda" if source.suffix == ".cu" else "compile"
            lines += [f"build {path(name)}: {rule} {path(source)}", f"  flags = {quote(unit_flags)}"]
        lines += [f"build {path(target)}: link {' '.join(path(name) for name, _, _ in units)}", ""]
        script = self.folder / f"{target}.ninja"
        text = "\n".join(lines)
        if not script.is_file() or script.read_text(encoding="utf-8") != text:
            script.write_text(text, encoding="utf-8")
        command = [self.ninja, "-f", script.name]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        import fcntl  # the extension is built on Linux only

        lines = []
        # one build at a time in a folder: two would write the same objects
        with open(self.folder / "lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen([*command, target], cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if "no work to do" not in line:
                    print(line, end="", flush=True)
            returncode = process.wait()
        self.changed = not any("no work to do" in line for line in lines)
        if returncode:
            first = next((line for line in lines if re.search(r"\berror *:|\bfatal *:|undefined reference", line)), None)
            reason = f"First error: {first or ' '.join(lines)[-500:]}"
            if any(line.startswith("FAILED: ") and "cuda/" in line for line in lines) and isinstance(self.nvcc, Nvcc):
                fail(f"the CUDA build failed with nvcc {self.nvcc.version}; DEPTHLSTM_CUDA=0 builds without CUDA. {reason}")
            fail(f"the C++ build failed with {self.identity}. {reason}")
        return self.folder / target


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        builder = NinjaBuild()
        built = builder.library()
        target = Path(self.get_ext_fullpath(ext.name))
        place(built, target)
        FAILURE_FILE.unlink(missing_ok=True)
        if builder.changed:
            if isinstance(builder.nvcc, Nvcc):
                print(f"depthlstm_fast: CUDA C++ kernels for {', '.join(builder.nvcc.archs)} by nvcc {builder.nvcc.version}")
            else:
                print(f"depthlstm_fast: CUDA C++ kernels are not part of this build: {builder.nvcc}")
        if os.environ.get("DEPTHLSTM_TESTING") == "1":
            place_internals(builder)


class BuildInternals(Command):
    description = "build the pybind11 module that the tests use"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        place_internals(NinjaBuild())


class BuildSmoke(BuildInternals):
    description = "build tests/cpp/smoke.cpp, the kernels without Python and torch"

    def run(self) -> None:
        built = NinjaBuild().smoke()
        if built is not None:
            print(built)


def place(built: Path, target: Path) -> None:
    """Copies by rename: a process that has the old library mapped keeps it intact."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.copy2(built, partial)
    os.replace(partial, target)


def place_internals(builder: NinjaBuild) -> None:
    built = builder.internals()
    if built is not None:
        place(built, ROOT / "tests" / built.name)


def extensions() -> list[Extension]:
    if os.environ.get("DEPTHLSTM_NO_EXTENSION") == "1":
        return []
    if not sys.platform.startswith("linux"):
        print(f"depthlstm_fast: the compiled kernels are built on Linux only; on {sys.platform} the reference backend is installed alone")
        return []
    return [Extension("depthlstm_fast._C", sources=[], py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_internals": BuildInternals, "build_smoke": BuildSmoke},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
