"""Write build.ninja for a target and run it.

A new op is a folder of csrc. Its files are found by their names:

    csrc/common/cpu/*.cpp, csrc/<op>/cpu*.cpp      without torch; *_kernel.cpp once for each instruction set
    csrc/<op>/cuda_*.cu                            by nvcc, without torch; *_kernel.cu once for each dtype
    csrc/*.cpp, csrc/<op>/*_op.cpp                 over torch's stable ABI; cuda_op.cpp if there is nvcc
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from settings import (
    COMMON_FLAGS,
    CUDA_DTYPES,
    CUDA_LINK,
    LIBRARY,
    NVCC_FLAGS,
    ROOT,
    TORCH_TARGET,
    VERSION,
    fail,
    isas,
    sanitizers,
)
from toolchain import Nvcc, find_compiler, find_ninja, find_nvcc, find_torch, gencode

CSRC = ROOT / "csrc"


class Unit(NamedTuple):
    """An object file, its source, and its own flags."""

    name: str
    source: Path
    flags: list[str]


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
        # messages name the sources as the repository does, in every build folder
        self.includes = [
            f"-ffile-prefix-map={ROOT}/=",
            f"-I{ROOT / 'csrc'}",
            "-isystem",
            str(ROOT / "third_party" / "xsimd" / "include"),
        ]
        # gcc and clang spell this option differently; a template error floods the terminal without a limit
        self.limit_flags = ["-ferror-limit=5"] if "clang" in self.identity else ["-fmax-errors=5"]
        self.sanitize_flags: list[str] = []
        if self.sanitize:
            # -O1 after -O3: instrumented vector code takes minutes to optimise further
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

    def cpu_units(self) -> list[Unit]:
        """Return the CPU kernels of every op, and their common code."""
        units = []
        for source in sorted(CSRC.glob("*/cpu_kernel.cpp")):
            # the widest sets take the longest, so they are started first
            for isa, flags in reversed(isas().items()):
                isa_flags = [*flags, f"-DDEPTHLSTM_ISA={isa}", f"-DDEPTHLSTM_ISA_{isa.upper()}=1"]
                units.append(Unit(f"{source.parent.name}/{source.stem}.{isa}.o", source, isa_flags))
        units += [
            Unit(f"common/{source.stem}.o", source, isas()["generic"])
            for source in sorted(CSRC.glob("common/cpu/*.cpp"))
        ]
        if not units:
            fail(f"no C++ sources in {CSRC}: the source tree is incomplete")
        return units

    def cuda_units(self, nvcc: Nvcc) -> list[Unit]:
        """Return the GPU kernels of every op."""
        common = gencode(nvcc.archs)
        if os.environ.get("CXX") and len(self.compiler.split()) == 1:  # nvcc does not accept "ccache g++"
            common += ["-ccbin", self.compiler]
        units = []
        for source in sorted(CSRC.glob("*/cuda_*.cu")):
            stem = f"cuda/{source.parent.name}/{source.stem}"
            if source.stem.endswith("_kernel"):
                units += [
                    Unit(f"{stem}.{z}.o", source, [*common, f"-DDEPTHLSTM_Z={z}", f"-DDEPTHLSTM_Z_{z.upper()}=1"])
                    for z in CUDA_DTYPES
                ]
            else:
                units.append(Unit(f"{stem}.o", source, common))
        if not units:
            fail(f"no CUDA sources in {CSRC}: the source tree is incomplete; DEPTHLSTM_CUDA=0 builds without them")
        return units

    def torch_units(self, name: str, flags: list[str]) -> list[Unit]:
        """Return the operators that torch sees, csrc/<op>/<name>.cpp."""
        return [
            Unit(f"torch/{source.parent.name}_{name}.o", source, flags) for source in sorted(CSRC.glob(f"*/{name}.cpp"))
        ]

    def library(self) -> Path:
        torch_folder, torch_version = find_torch()
        self.nvcc = "a build with sanitizers is without CUDA" if self.sanitize else find_nvcc()
        cuda, nvcc = (
            (",".join(self.nvcc.archs), self.nvcc.version) if isinstance(self.nvcc, Nvcc) else ("none", self.nvcc)
        )
        compiler, nvcc = (re.sub(r"[;'\"\\]", " ", text) for text in (self.identity, nvcc))
        stamp = (
            f"depthlstm_fast build: version={VERSION};compiler={compiler};torch={torch_version};isa={','.join(isas())}"
        )
        stamp += f";sanitize={self.sanitize or 'none'};cuda={cuda};nvcc={nvcc}"
        headers = [
            "-isystem",
            str(torch_folder / "include"),
            "-isystem",
            str(torch_folder / "include" / "torch" / "csrc" / "api" / "include"),
        ]
        flags = [*isas()["generic"], *headers, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        about = Unit("library.o", CSRC / "library.cpp", [*isas()["generic"], f'-DDEPTHLSTM_BUILD_INFO="{stamp}"'])
        units = [*self.cpu_units(), *self.torch_units("cpu_op", flags), about]
        # --no-as-needed: the linker would drop libtorch.so, and loading it makes torch's symbols available
        link = [
            "-shared",
            f"-L{torch_folder / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-Wl,--as-needed",
        ]
        link += ["-Wl,--exclude-libs,ALL", "-Wl,-z,relro,-z,now"]
        if not self.sanitize:
            link += ["-Wl,--no-undefined", f"-Wl,-rpath-link,{torch_folder / 'lib'}"]
        if isinstance(self.nvcc, Nvcc):
            cuda_flags = [*flags, f'-DDEPTHLSTM_CUDA_ARCHS="{cuda}"']
            units = [*self.cuda_units(self.nvcc), *units, *self.torch_units("cuda_op", cuda_flags)]
            link += [*(f"-L{folder}" for folder in self.nvcc.library_folders), *CUDA_LINK]
        return self.run(LIBRARY, units, link)

    def internals(self) -> Path | None:
        source = CSRC / "testing.cpp"
        if not source.is_file():
            print("depthlstm_fast: csrc/testing.cpp is absent, nothing to build for the tests")
            return None
        if importlib.util.find_spec("pybind11") is None:
            fail("pybind11 is not installed, the tests' internals need it. Run: pip install pybind11")
        import pybind11

        flags = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
        name = "_internals" + str(sysconfig.get_config_var("EXT_SUFFIX"))
        return self.run(
            name, [*self.cpu_units(), Unit(f"testing.{sys.implementation.cache_tag}.o", source, flags)], ["-shared"]
        )

    def smoke(self) -> Path | None:
        sources = sorted((ROOT / "tests" / "cpp").glob("smoke*.cpp"))
        if not sources:
            print("depthlstm_fast: tests/cpp/smoke*.cpp are absent, nothing to build")
            return None
        own = [Unit(f"{source.stem}.o", source, isas()["generic"]) for source in sources]
        return self.run("smoke", [*self.cpu_units(), *own], ["-pthread"])

    def run(self, target: str, units: list[Unit], link_flags: list[str]) -> Path:
        def quote(words: list[str]) -> str:
            # one shell (single quotes around special words), then ninja's own escape
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
        environment = {"NINJA_STATUS": "[%f/%t, %e s] ", **os.environ}
        import fcntl  # the extension is built on Linux only

        lines = []
        # one build at a time in a folder, because two would write the same objects
        with open(self.folder / "lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # ninja names a file only when it is done, possibly minutes later
            planned = subprocess.run(
                [*command, "-n", target], cwd=self.folder, text=True, capture_output=True, check=False
            ).stdout
            if objects := re.findall(r"^\[\d+/\d+\] compile (\S+)", planned, re.M):
                print(f"depthlstm_fast: compiling {len(objects)} files: {', '.join(objects)}", flush=True)
            process = subprocess.Popen(
                [*command, target],
                cwd=self.folder,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if "no work to do" not in line:
                    print(line, end="", flush=True)
            returncode = process.wait()
        self.changed = not any("no work to do" in line for line in lines)
        if returncode:
            first = next(
                (line for line in lines if re.search(r"\berror *:|\bfatal *:|undefined reference", line)), None
            )
            reason = f"First error: {first or ' '.join(lines)[-500:]}"
            if any(line.startswith("FAILED: ") and "cuda/" in line for line in lines) and isinstance(self.nvcc, Nvcc):
                fail(
                    f"the CUDA build failed with nvcc {self.nvcc.version}; "
                    f"DEPTHLSTM_CUDA=0 builds without CUDA. {reason}"
                )
            fail(f"the C++ build failed with {self.identity}. {reason}")
        return self.folder / target
