"""The package as it is installed where there is no compiler: built, unpacked and started."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from llm_serving.kernels.cpu.native import INSTRUCTION_SET

HOUSE = pathlib.Path(__file__).parents[1]
BUILD_REQUIREMENTS = ("scikit_build_core", "nanobind", "pip")


def run(*words: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != INSTRUCTION_SET}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**kept, **environment},
        check=False,
    )


def test_without_a_compiler_the_package_installs_and_says_that_it_runs_on_reference(
    tmp_path: pathlib.Path,
) -> None:
    if missing := [name for name in BUILD_REQUIREMENTS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"it cannot be built here without {', '.join(missing)}")
    source, installed = tmp_path / "source", tmp_path / "installed"
    left_out = shutil.ignore_patterns("_native*.so", "__pycache__")
    shutil.copytree(HOUSE / "llm_serving", source / "llm_serving", ignore=left_out)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(HOUSE / name, source)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    no_compiler = {"CXX": "/bin/false", "CC": "/bin/false"}
    built = run(
        "-m", "pip", "wheel", "-v", *flags, "-w", str(tmp_path), ".", cwd=source, **no_compiler
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "is not able to compile" in built.stdout + built.stderr  # else it proves nothing
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "llm_serving/kernels/cpu/native.py" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".hpp"))]
    started = run(
        *("-S", "-m", "llm_serving", "serve", "--model", str(tmp_path / "no-model"), "--port", "0"),
        *("--device", "cpu"),
        cwd=installed,
        PYTHONPATH=f"{installed}{os.pathsep}{sysconfig.get_path('purelib')}",
    )  # -S: an editable install, in a .pth file, would come first
    assert started.returncode == 1
    assert "kernels    reference: the extension module was not built (" in started.stdout
    assert "Traceback" not in started.stderr
