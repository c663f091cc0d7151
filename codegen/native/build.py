"""Build C++ source into a shared library with the user's compiler, and keep it.

Libraries are cached by what decides their content: source, flags, compiler and CPU. The folder is
`moecc` under `$XDG_CACHE_HOME` or `~/.cache`; it must belong to the user and be closed to everybody
else, because its files are executed. Where that cannot be had, a temporary folder serves for the
life of the process. `$CXX` names the compiler and `$CXXFLAGS` adds flags, as for any build.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from moecc.runtime.errors import BuildError, NoCompiler

log = logging.getLogger(__name__)

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # fused where the source says so, so that every tile adds up alike
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_PROBE = '#include <omp.h>\nextern "C" int probe() { return omp_get_max_threads(); }\n'
_DIGEST = hashlib.sha256().digest_size


def load(source: str) -> ctypes.CDLL:
    """Load the library built from `source`, building it unless it is in the cache.

    Raises `NoCompiler` when there is no compiler that works, `BuildError` when the one there is
    refuses the source.
    """
    return ctypes.CDLL(str(build(source, find_compiler())))


def find_compiler() -> tuple[str, ...]:
    """Find a C++ compiler that builds a small OpenMP library; return its command.

    Tries `$CXX` alone when it is set, else c++, g++ and clang++. Raises `NoCompiler`.
    """
    return _find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


def openmp_threads() -> int:
    """Ask a library that is built here how many threads OpenMP gives it; raises as `load` does."""
    return int(load(_PROBE).probe())


@functools.cache
def _find_compiler(chosen: str, path: str) -> tuple[str, ...]:
    tried: list[str] = []
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        try:
            words = tuple(shlex.split(command))
        except ValueError as error:
            tried.append(f"{command!r}: {error}")
            continue
        if not words or shutil.which(words[0], path=path) is None:
            tried.append(f"{command!r}: not found")
            continue
        try:
            ctypes.CDLL(str(build(_PROBE, words)))
        except (BuildError, OSError) as error:
            tried.append(f"{command!r}: {error}")
        else:
            return words
    raise NoCompiler(
        f"no C++ compiler works here; tried {'; '.join(tried)}. Install g++ (Debian: "
        "`apt install g++`, Fedora: `dnf install gcc-c++`) or set CXX to one with OpenMP"
    )


def build(source: str, compiler: tuple[str, ...]) -> Path:
    """Return the library of `source`, built with `compiler` unless a sound one is cached.

    Raises `BuildError` also when the library cannot be written, or CXXFLAGS cannot be read.
    """
    try:
        return _build(source, compiler)
    except (OSError, ValueError) as error:
        raise BuildError(f"building a kernel failed: {error}") from error


def _build(source: str, compiler: tuple[str, ...]) -> Path:
    command = (*compiler, *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")))
    identity = "\0".join([source, *command, _version(compiler), cpu_identity()])
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    library = cache_folder() / f"{name}.so"
    if not _is_sound(library):
        _compile(source, command, library)
    return library


def cache_folder() -> Path:
    """Return the owner-only folder that holds built libraries, creating it if needed."""
    try:
        return kept_folder()
    except (OSError, RuntimeError) as error:
        log.warning("kernels are not kept after this process: %s", error)
        return _temporary_folder()


def kept_folder() -> Path:
    """Return the folder that outlives the process.

    Raises `OSError` when it is not the user's alone or cannot be written, `RuntimeError` without a
    home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (root if root.is_absolute() else Path.home() / ".cache") / "moecc"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is not a folder that belongs to this user")
    if info.st_mode & 0o077:
        folder.chmod(0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder


@functools.cache
def _temporary_folder() -> Path:
    # Held by the cache of this function, and so until the interpreter ends.
    holder = tempfile.TemporaryDirectory(prefix="moecc-", ignore_cleanup_errors=True)
    _HOLDERS.append(holder)
    return Path(holder.name)


_HOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _is_sound(library: Path) -> bool:
    """Tell whether a cached file is whole: its last bytes are the digest of the rest."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _compile(source: str, command: tuple[str, ...], library: Path) -> None:
    """Compile in a folder of our own, then move into place at once."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        code, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        code.write_text(source)
        result = subprocess.run(
            [*command, "-o", str(built), str(code)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0 or not built.is_file():
            raise BuildError(f"{shlex.join(command)} failed: {_first_complaint(result.stderr)}")
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())
        built.replace(library)


def _first_complaint(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line)]
    return (errors or lines or ["it said nothing"])[0].strip()


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        result = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {error}") from error
    return result.stdout


@functools.cache
def cpu_identity() -> str:
    """Name the CPU and its instructions: what `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.split("\t")[0].strip() in wanted)
