"""Builds harmonica_kernels/_C with CMake; pyproject.toml holds everything else."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures anew at every build. Each Python has its folder in build/, so a rebuild compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("harmonica-kernels: pybind11 is missing; `pip install .` brings it, or, with "
                             "--no-build-isolation, `pip install pybind11 cmake ninja` first") from None
        cmake, ninja = (self._tool(name) for name in ("cmake", "ninja"))
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise SystemExit("harmonica-kernels: no C++ compiler found; install g++ or clang++ (on Debian and Ubuntu, "
                             "apt-get install g++), or set CXX")
        headers = sysconfig.get_path("include")
        if not Path(headers, "Python.h").exists():
            raise SystemExit(f"harmonica-kernels: no Python.h in {headers}; install Python's headers (on Debian and "
                             f"Ubuntu, apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev)")

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        for found in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMake*Compiler.cmake")):
            found.unlink(missing_ok=True)  # compilers change and checkouts move; compiled objects may stay
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
                       check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next(build.glob("_C.*.so")), target)

    @staticmethod
    def _tool(name: str) -> str:
        beside_python = shutil.which(name, path=str(Path(sys.executable).parent))
        found = beside_python or shutil.which(name)
        if found is None:
            raise SystemExit(f"harmonica-kernels: {name} is missing; `pip install {name}` or your system's package")
        return found


setup(ext_modules=[Extension("harmonica_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
