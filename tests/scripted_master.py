"""A master in a process of its own, to be killed: one step hangs in its agent for ever.

    python tests/scripted_master.py '{"transport": "unix"}' '{"hang_at": [1]}'

Prints the pid of its agent when that is in the step.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.deployment import Deployment, step


async def main() -> None:
    deployed = Deployment(1, json.loads(sys.argv[1]), json.loads(sys.argv[2]))
    await deployed.worker.start()
    future = deployed.worker.submit(step(1, 1))
    await deployed.events.has("in step 1")
    print(deployed.pids[0], flush=True)
    await future


if __name__ == "__main__":
    asyncio.run(main())
