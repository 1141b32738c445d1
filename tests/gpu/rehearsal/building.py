"""Builds `device.cpp` against the torch that is installed, once a build of torch, and loads it."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def load() -> None:
    """Build what is not built yet, and load it into this process, before torch asks for CUDA the first time.

    Raises:
        subprocess.CalledProcessError: the compiler refused; its words are on standard error.
        FileNotFoundError: there is no `g++`.
    """
    ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)


def _built() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    torch = Path(spec.origin).parent
    version = importlib.metadata.version("torch")
    # The libraries' place is part of the file: another environment builds its own.
    told = f"{version} {torch} {SOURCE.read_text(encoding='utf-8')}"
    name = f"halfstep-pretended-cuda-{os.getuid()}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                *("g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", str(SOURCE)),
                *(
                    "-o",
                    str(fresh),
                    f"-L{torch / 'lib'}",
                    "-lc10",
                    "-ltorch_cpu",
                    f"-Wl,-rpath,{torch / 'lib'}",
                ),
            ],
            check=True,
        )
        fresh.replace(library)
    return library
