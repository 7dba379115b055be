"""Start a server in the background and return when it is ready.

    python examples/start.py --task 1 --config configs/llama/llama_7b_kbk_pa_dyn.yaml

Prints where the server's log is.  `--foreground` stays in front; further flags go to
`llm-serving serve`.  If the server cannot start, its reason is printed and the exit code is not 0.
`llm-serving stop [--port]` ends what this leaves behind.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request

HOUSE = pathlib.Path(__file__).resolve().parents[1]
COMMAND = HOUSE / ".venv" / "bin" / "llm-serving"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--foreground", action="store_true", help="stay in front until Ctrl-C")
    parser.add_argument("--log", type=pathlib.Path, help="where the server's output goes")
    parser.add_argument("--timeout", type=float, default=900, help="seconds to wait [900]")
    args, serve_flags = parser.parse_known_args()
    if not COMMAND.exists():
        print("llm-serving is not installed here yet: run `make install` first", file=sys.stderr)
        return 1
    command = [str(COMMAND), "serve", *serve_flags]
    if args.foreground:
        os.execv(command[0], command)
    return start(command, args.log or default_log(), args.timeout)


def default_log() -> pathlib.Path:
    state = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local" / "state"
    name = f"serve-{time.strftime('%Y-%m-%d-%H_%M_%S')}-{os.getpid()}.log"
    return pathlib.Path(state) / "llm-serving" / name


def start(command: list[str], log: pathlib.Path, timeout_s: float) -> int:
    """Start the server apart from this terminal and wait for its word that it is ready."""
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"log: {log}", flush=True)
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        return wait_until_ready(server, log, timeout_s)
    except BaseException:  # Ctrl-C: nobody would know of it any more
        end(server)
        raise


def wait_until_ready(server: subprocess.Popen[bytes], log: pathlib.Path, timeout_s: float) -> int:
    deadline, shown = time.monotonic() + timeout_s, 0
    while time.monotonic() < deadline:
        shown = show_news(log, shown)
        if server.poll() is not None:
            show_news(log, shown)
            print(f"the server did not start: exit code {server.returncode}", file=sys.stderr)
            return server.returncode or 1
        if (url := ready_url(log)) and answers(url):
            show_news(log, shown)
            return 0
        time.sleep(0.1)
    end(server)
    print(f"the server was not ready within {timeout_s:g} s and was stopped", file=sys.stderr)
    return 1


def end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def show_news(log: pathlib.Path, shown: int) -> int:
    """Print what was logged since the last look; how many bytes have been shown."""
    news = log.read_bytes()[shown:]
    sys.stdout.write(news.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(news)


def ready_url(log: pathlib.Path) -> str | None:
    """The address in the server's last line of its start, "ready at http://...": it knows best."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("ready at "):
            return line.split()[2]
    return None


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
