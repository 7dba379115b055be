"""No engine builds the image here, so everything that it names is checked to exist."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess

from llm_serving.cli import COMMANDS

HOUSE = pathlib.Path(__file__).parents[1]
LINES = (HOUSE / "Dockerfile").read_text().replace("\\\n", " ").splitlines()


def arguments(instruction: str) -> list[str]:
    return [line.split(" ", 1)[1].strip() for line in LINES if line.startswith(f"{instruction} ")]


def test_every_path_that_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (HOUSE / ".dockerignore").read_text().split()
    sources = [
        source
        for line in arguments("COPY")
        if "--from" not in line
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    needed = {"pyproject.toml", "constraints.txt", "CMakeLists.txt", "Makefile", "llm_serving"}
    assert needed <= set(sources)
    for source in sources:
        assert (HOUSE / source).exists(), source
        assert source not in ignored


def test_what_the_installation_needs_is_copied() -> None:
    copied = " ".join(arguments("COPY"))
    for needed in re.findall(r"readme = \"(.+)\"", (HOUSE / "pyproject.toml").read_text()):
        assert needed in copied
    (install,) = [line for line in arguments("RUN") if line.startswith("make")]
    target, *variables = install.partition(" && ")[0].split()[1:]
    makefile = (HOUSE / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.M)
    for variable in variables:
        assert re.search(rf"^{variable.split('=')[0]} \?=", makefile, re.M), variable


def test_its_make_line_expands_to_requirements_that_pip_understands(tmp_path: pathlib.Path) -> None:
    (line,) = [line for line in arguments("RUN") if line.startswith("make")]
    made = line.partition(" && ")[0]
    words = made.replace("${TORCH_INDEX}", "https://index.invalid").split()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        (tmp_path / name).write_text((HOUSE / name).read_text())
    dry = [words[0], "--dry-run", "-C", str(tmp_path), *words[1:]]
    shown = subprocess.run(dry, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"--no-deps --index-url https://index.invalid torch==[\d.]+\n", shown)
    assert re.search(r"-c constraints.txt -e '\.'\n", shown)
    assert "text-generation" not in shown


def test_the_command_is_one_of_ours_with_flags_that_exist() -> None:
    (entry,), (command,) = arguments("ENTRYPOINT"), arguments("CMD")
    program, name, *flags = [w.strip(",") for w in shlex.split(entry.strip("[]"))]
    assert (program, name) == ("llm-serving", "serve")
    assert name in COMMANDS
    serve = (HOUSE / "llm_serving/commands/serve.py").read_text()
    more = [word.strip(",") for word in shlex.split(command.strip("[]"))]
    for word in [*flags, *more]:
        assert not word.startswith("--") or f'"{word}"' in serve, word
        assert not word.endswith(".yaml") or (HOUSE / word).exists()


def test_it_does_not_run_as_root_and_asks_for_its_health() -> None:
    assert arguments("USER") == ["serving"]
    (health,) = arguments("HEALTHCHECK")
    port = re.search(r"127.0.0.1:(\d+)(/\w+)", health)
    assert port is not None
    assert arguments("EXPOSE") == [port.group(1)]
    routes = (HOUSE / "llm_serving/api/app.py").read_text()
    assert f'"{port.group(2)}"' in routes
