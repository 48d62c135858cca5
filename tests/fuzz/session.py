"""Runs a target's inputs in children: watches the clock, saves what a finding was found with, starts again behind a crash."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .child import CURRENT
from .targets import load

START = 180.0  # seconds for a child to import everything and to run the valid inputs
CHILD = 500  # inputs of one child; what libraries leak does not count against the limit
QUIET = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "HF_HOME": "hub"}


class Session:
    """One target's run; its children work in `room`, inputs of findings go to `saved`."""

    def __init__(self, name: str, seed: int, bundle: Path, room: Path, saved: Path, *, guided: bool = False) -> None:
        self.target, self.seed, self.bundle, self.room, self.saved, self.guided = load(name), seed, bundle, room, saved, guided
        self.outcomes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.findings: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.slowest = 0.0

    def run(self, count: int, seconds: float) -> dict[str, Any]:
        """Inputs 0 to `count`, or as many as `seconds` allow."""
        started, done = time.monotonic(), 0
        while done < count and time.monotonic() - started < seconds:
            done = self._child(done, count if self.guided else min(count, done + CHILD), started + seconds)
        return {
            "inputs": sum(self.outcomes.values()),
            "seconds": round(time.monotonic() - started, 1),
            "accepted": self.outcomes["accepted"],
            "refused": dict(self.refused.most_common()),
            "slowest_seconds": round(self.slowest, 2),
            "findings": list(self.findings.values()),
        }

    def _child(self, begin: int, end: int, deadline: float) -> int:
        """Run inputs from `begin` in one child until it ends; the number of the next input."""
        room = self.room / "child"
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        reading, writing = os.pipe()
        words = [sys.executable, "-m", "fuzz.child", self.target.name, *map(str, (self.seed, begin, end, writing))]
        words += [str(self.room / "corpus")] if self.guided else []
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **QUIET, "PYTHONPATH": path, "CLAPSEP_FUZZ_BUNDLE": str(self.bundle)}
        with (self.room / "log").open("wb") as log:
            child = subprocess.Popen(words, cwd=room, env=environment, pass_fds=[writing], stdout=log, stderr=log)
        os.close(writing)
        try:
            return self._listen(child, reading, begin, deadline)
        finally:
            child.kill()
            child.wait()

    def _listen(self, child: subprocess.Popen[bytes], reading: int, begin: int, deadline: float) -> int:
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_forward, args=(reading, lines), daemon=True)
        reader.start()
        number, running, patience = begin, False, START
        while time.monotonic() < deadline:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                return self._stopped(number, running, {"kind": "hang", "type": f"more than {patience:.0f} s", "place": "", "message": ""})
            if line is None:
                code = child.wait()
                return number if code == 0 and not running else self._stopped(number, running, self._crash(code))
            message = json.loads(line)
            if "number" in message:
                number, running, patience = message["number"], True, self.target.seconds
            elif "outcome" in message:
                self._note(number, message)
                number, running, patience = number + 1, False, START
        return number

    def _note(self, number: int, message: dict[str, Any]) -> None:
        self.outcomes[message["outcome"]] += 1
        self.slowest = max(self.slowest, message["seconds"])
        if message["outcome"] == "refused":
            self.refused[message["type"]] += 1
        elif message["outcome"] == "finding":
            self._find(number, {key: message[key] for key in ("kind", "type", "place", "message")})

    def _crash(self, code: int) -> dict[str, Any]:
        """What a child that ended by itself died of."""
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = (self.room / "log").read_bytes()[-2000:].decode(errors="replace").strip()
        return {"kind": "crash", "type": name, "place": "", "message": said[-500:]}

    def _stopped(self, number: int, running: bool, finding: dict[str, Any]) -> int:
        if not running:
            raise RuntimeError(f"{self.target.name}: the child failed outside of an input: {finding}")
        self.outcomes["finding"] += 1
        self._find(number, finding)
        return number + 1

    def _find(self, number: int, finding: dict[str, Any]) -> None:
        """Count a finding; the first input of each kind and place is saved."""
        key = (finding["kind"], finding["type"], finding["place"])
        if key not in self.findings:
            self.saved.mkdir(parents=True, exist_ok=True)
            kept, current = (self.room / "child" / name for name in (f"{number}.bin", CURRENT))
            shutil.copyfile(kept if kept.exists() else current, self.saved / f"{self.target.name}-{self.seed}-{number}.bin")
            self.findings[key] = {**finding, "count": 0, "numbers": []}
        self.findings[key]["count"] += 1
        if len(self.findings[key]["numbers"]) < 20:
            self.findings[key]["numbers"].append(number)


def _forward(reading: int, lines: queue.Queue[str | None]) -> None:
    with os.fdopen(reading) as stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
