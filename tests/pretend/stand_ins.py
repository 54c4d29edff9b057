"""Compiles and loads what stands in for a GPU: `libcuda.c`, which Triton launches into, and `device_guard.cpp`, which torch asks."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
COMPILERS = {"libcuda.c": "gcc", "device_guard.cpp": "g++"}
LIBRARIES = {"libcuda.c": "libcuda.so.1", "device_guard.cpp": "libdevice_guard.so"}


def why_not() -> str:
    """What this machine lacks to pretend a GPU; "" if nothing."""
    if not sys.platform.startswith("linux"):
        return "a GPU is pretended on Linux only"
    missing = [compiler for compiler in COMPILERS.values() if shutil.which(compiler) is None]
    return f"a GPU is pretended with the help of {' and '.join(missing)}, not installed here" if missing else ""


@cache
def load() -> ctypes.CDLL:
    """The stand-in for libcuda, loaded before Triton looks for one; torch's guard beside it."""
    folder = _built()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # what Triton's host code is linked to
    libcuda = ctypes.CDLL(str(folder / LIBRARIES["libcuda.c"]), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / LIBRARIES["device_guard.cpp"]), mode=ctypes.RTLD_GLOBAL)
    return libcuda


def _built() -> Path:
    """The folder of both libraries, compiled at most once for these sources and this torch and Triton."""
    import torch
    import triton

    sources = "".join((HERE / name).read_text() for name in COMPILERS)
    key = hashlib.sha256(f"{sources}{torch.__version__}{torch.__file__}{triton.__version__}".encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "cpflex-tests" / f"pretend-{key}"
    if folder.exists():
        return folder
    torch_root = Path(torch.__file__).parent
    options = {
        "libcuda.c": ["-Wl,-soname,libcuda.so.1", f"-I{Path(triton.__file__).parent}/backends/nvidia/include"],
        "device_guard.cpp": ["-std=c++20", f"-I{torch_root}/include", f"-L{torch_root}/lib", "-lc10"],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        half = Path(temporary) / "built"
        half.mkdir()
        for name, compiler in COMPILERS.items():
            command = [
                compiler,
                "-shared",
                "-fPIC",
                str(HERE / name),
                *options[name],
                "-o",
                str(half / LIBRARIES[name]),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        try:
            half.rename(folder)  # whole or not at all
        except OSError:  # another process was faster
            assert folder.exists()
    return folder
