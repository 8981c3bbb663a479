"""What it costs honest sites that strangers and a hostile site try everything at the server's door.

    python benchmarks/door.py --json benchmarks/results/door.json

The same rounds of two clients with kits, quiet and while `door_fuzz.py` runs all the time: seconds a round (the median
of all), their ratio, and the most memory that the SuperLink had. The attacker shares the machine, at a lower priority.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faults import ENVIRONMENT, LOCAL_IMAGES, prepare  # type: ignore[import-not-found]  # beside this file

from maskdm.federated.policy import UNATTENDED
from maskdm.run.processes import free_port, script
from maskdm.run.runfolder import read_lines, write_json
from maskdm_server.kits.provision import provision

SITES = ("a", "b")
FUZZ = Path(__file__).with_name("door_fuzz.py")
LONGEST = 3600.0


def federate(folder: Path, prior: Path, data: list[Path], rounds: int, seed: int | None) -> dict[str, Any]:
    """Run all rounds; with a seed, under attack."""
    folder.mkdir()
    port = free_port()
    provision(folder / "kits", f"127.0.0.1:{port}", [*SITES, "hostile"], policy=UNATTENDED.encode())
    serve = [
        "--prior",
        str(prior),
        "--out",
        "fed",
        "--tls",
        "kits/server",
        "--host",
        "127.0.0.1",
        "--rounds",
        str(rounds),
    ]
    started = [
        start(folder, "maskdm-server", "serve", *serve, "--min-replies", "2", "--local-images", str(LOCAL_IMAGES))
    ]
    for name, images in zip(SITES, data, strict=False):
        kit = ["--kit", f"kits/{name}.zip", "--data", str(images), "--out", f"site-{name}", "--threads", "1"]
        kit += ["--fraction", "0.3"]  # which of them are left for training is by chance; a tenth may be too few
        started.append(start(folder, "maskdm-client", *kit))
    fuzz, memory = None, 0
    deadline = time.monotonic() + LONGEST
    while started[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        assert all(process.poll() in (None, 0) for process in started), "a client or the server has ended by itself"
        memory = max(memory, resident(folder))
        # Not before the first round has begun: what is measured is the rounds.
        if seed is not None and fuzz is None and any(event["event"] == "sent" for event in events(folder)):
            command = [sys.executable, str(FUZZ), f"127.0.0.1:{port}", "--kit", "kits/hostile.zip"]
            command += ["--seconds", str(LONGEST), "--seed", str(seed)]
            fuzz = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    if fuzz:
        fuzz.kill()
        fuzz.wait()
    exits = [process.wait(120) for process in started]
    lines = read_lines(folder / "fed" / "rounds.jsonl")
    return {
        "attacked": seed is not None,
        "rounds": len(lines),
        "clients": [line["clients"] for line in lines],
        "seconds": [line["seconds"] for line in lines],
        "seconds_a_round": round(statistics.median(line["seconds"] for line in lines), 1),
        "superlink_megabytes": memory // 1000,
        "superlink_log_bytes": (folder / "fed" / "logs" / "superlink.log").stat().st_size,
        "exits": exits,
    }


def start(folder: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / f"{program}.log").open("ab") as log:
        return subprocess.Popen([script(program), *arguments], cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)


def events(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "fed" / "events.jsonl")


def resident(folder: Path) -> int:
    """Kilobytes that the SuperLink of a federation has in memory."""
    most = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (entry / "cmdline").read_bytes(), (entry / "status").read_text()
        except OSError:
            continue
        if b"maskdm_server.door.door" in command and str(folder).encode() in command:
            most = max(most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="door-") as name:
        folder = Path(name)
        prior, data = prepare(folder)
        quiet = federate(folder / "quiet", prior, data, given.rounds, None)
        print(json.dumps(quiet), flush=True)
        attacked = federate(folder / "attacked", prior, data, given.rounds, given.seed)
        print(json.dumps(attacked), flush=True)
    ratio = round(attacked["seconds_a_round"] / quiet["seconds_a_round"], 2)
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "seed": given.seed}
    print(f"a round takes {ratio} times as long under attack")
    if given.json:
        write_json(given.json, {"quiet": quiet, "attacked": attacked, "ratio": ratio, **about})


if __name__ == "__main__":
    main()
