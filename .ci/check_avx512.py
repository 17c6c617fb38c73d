"""Run smoke with AVX-512 on a CPU that has none: Bochs emulates a machine, which boots Linux and smoke alone.

    python .ci/check_avx512.py <build folder of smoke> <folder for all that is made>

BOCHS names another Bochs than that of PATH, and BOCHS_DISPLAY its display library, where it has no `term`. Bochs 2.7
has no BF16, so that avx512_bf16 needs a newer one. Exit status 3: what this takes cannot be had here, as the last line
says.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
BOCHS = os.environ.get("BOCHS", "bochs")
DISPLAY = os.environ.get("BOCHS_DISPLAY", "term")
# Models with AVX-512 and the sets that they run, the widest first.
MODELS = {"sapphire_rapids": ["avx512", "avx512_bf16"], "corei7_icelake_u": ["avx512"], "corei7_skylake_x": ["avx512"]}
# Bochs 2.7 names no size for the state of PKU (515) and a wrong one for XSAVEC's and XSAVES's (321, 323): Linux would
# do without AVX. It has FSRM (580) without ERMS, with which Linux copies beyond the end.
LINUX = (
    "loglevel=2 console=ttyS0,115200 clearcpuid=515,321,323,580 mitigations=off nosmp noapic tsc=reliable "
    "lpj=4000000 panic=-1 random.trust_cpu=on cryptomgr.notests"
)
MACHINE = """config_interface: textconfig
display_library: {display}
cpu: model={model}, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
megs: 256
ata0-master: type=cdrom, path={folder}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={folder}/serial.txt
clock: sync=none
log: {folder}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
"""
LIMIT = 900  # seconds of CPU, of which Bochs 2.7 takes two minutes


def cannot(reason: str) -> NoReturn:
    print(reason)
    sys.exit(3)


def say(*command: str) -> str:
    """Return all that a command prints."""
    run = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    return run.stdout + run.stderr


def unpack(package: str, folder: Path) -> None:
    """Unpack a Debian package that need not be installed."""
    found = folder / "packages" / package
    found.mkdir(parents=True)
    run = subprocess.run(["apt-get", "-qq", "download", package], cwd=found, capture_output=True, check=False)
    archives = list(found.glob("*.deb"))
    if run.returncode != 0 or not archives:
        cannot(f"apt-get download {package} failed")
    subprocess.run(["dpkg", "-x", archives[0], folder / "root"], check=True)


def link(build: Path, target: Path) -> None:
    """Link smoke once more, statically, from the objects that its build made."""
    objects = re.search(r"^build smoke: link (.+)$", (build / "smoke.ninja").read_text(encoding="utf-8"), re.M)
    assert objects is not None
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, "-static", "-s", *objects[1].split(), "-pthread", "-o", str(target)]
    subprocess.run(command, cwd=build, check=True)


def archive(files: dict[str, bytes | None]) -> bytes:
    """Return a cpio archive ("newc") of programs; None is the console."""
    packed = b""
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")]):
        mode, device = (0o020600, (5, 1)) if data is None else (0o100755, (0, 0))
        if name == "dev":
            mode = 0o040755
        size = len(data or b"")
        fields = [number + 1, mode, 0, 0, 1, 0, size, 0, 0, *device, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        packed += head + bytes(-len(head) % 4) + (data or b"") + bytes(-size % 4)
    return packed


def make_disc(build: Path, folder: Path, sets: list[str]) -> None:
    """Write boot.iso: ISOLINUX, Debian's kernel for virtual machines, and an initramfs of init and smoke."""
    kernel = re.search(r"Depends: (linux-image-\S+)", say("apt-cache", "depends", "linux-image-cloud-amd64"))
    if kernel is None:
        cannot("apt knows no package linux-image-cloud-amd64")
    for package in (kernel[1], "isolinux", "syslinux-common"):
        unpack(package, folder)
    root, disc = folder / "root", folder / "disc"
    disc.mkdir()
    shutil.copy(next(root.glob("boot/vmlinuz-*")), disc / "vmlinuz")
    for file in ("ISOLINUX/isolinux.bin", "syslinux/modules/bios/ldlinux.c32"):
        shutil.copy(root / "usr" / "lib" / file, disc)
    compiler = os.environ.get("CC", "gcc").split()
    command = [*compiler, "-O1", "-Wall", "-static", "-s", str(HERE / "emulated_init.c"), "-o", str(folder / "init")]
    subprocess.run(command, check=True)
    link(build, folder / "smoke")
    programs = {name: (folder / name).read_bytes() for name in ("init", "smoke")}
    (disc / "initrd").write_bytes(archive({"dev": b"", "dev/console": None, **programs}))
    words = f"{LINUX} SMOKE_SETS={','.join(sets)}"
    (disc / "isolinux.cfg").write_text(
        f"default linux\nprompt 0\nlabel linux\nkernel vmlinuz\ninitrd initrd\nappend {words}\n"
    )
    image = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    written = say("xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "boot.iso"), *image, str(disc))
    assert (folder / "boot.iso").is_file(), written


def run(command: list[str], serial: Path) -> float:
    """Run Bochs at a terminal of its own, which its display and its debugger want; return its seconds of CPU."""
    shown = ""
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "linux"
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        os.execvp(command[0], command)
    with contextlib.suppress(OSError):  # which ends it: Bochs is gone
        while True:
            shown = (shown + os.read(terminal, 1 << 16).decode(errors="replace"))[-2000:]
    usage = os.wait4(child, 0)[2]
    seconds = usage.ru_utime + usage.ru_stime
    if not serial.is_file():
        print(shown)
    elif seconds > LIMIT - 1:
        print(f"not done after {LIMIT} s of CPU")
    return seconds


def main(build: Path, folder: Path) -> None:
    model = next((model for model in MODELS if model in say(BOCHS, "--help", "cpu").split()), None)
    if model is None:
        cannot(f"{BOCHS} emulates no CPU with AVX-512")
    sets = MODELS[model]
    make_disc(build, folder, sets)
    (folder / "bochsrc").write_text(MACHINE.format(display=DISPLAY, model=model, folder=folder))
    command = [BOCHS, "-q", "-f", str(folder / "bochsrc")]
    if "-rc filename" in say(BOCHS, "--help"):  # a Bochs with a debugger waits for a command
        (folder / "continue").write_text("c\n")
        command += ["-rc", str(folder / "continue")]
    serial = folder / "serial.txt"
    seconds = run(command, serial)
    text = serial.read_text(errors="replace").replace("\r", "") if serial.is_file() else ""
    print(text)
    print(f"{model} of {BOCHS}: {seconds:.0f} s of CPU")
    for isa in sets:
        for line in (f"smoke: {isa}, ", f"smoke of decoding: {isa}, ", f"{isa} ended with status 0\n"):
            if f"\n{line}" not in f"\n{text}":
                sys.exit(f"{isa}: no line of smoke begins with {line!r}")
    for isa in MODELS["sapphire_rapids"]:
        if isa not in sets:
            print(f"not run: {isa}, which {model} of this Bochs lacks")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
