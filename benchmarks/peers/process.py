"""A contender's process, seen from the runner: ask, stop, go on, count, end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.peers.contenders import Entry

ROOT = Path(__file__).parent.parent.parent
TICK = os.sysconf("SC_CLK_TCK")


class FailedError(Exception):
    """The contender cannot go on; the message is what the table shows."""


class Process:
    """One child in a session of its own. Whoever is not on turn is stopped, with all processes of the session.

    Args:
        name: of the contender.
        python: the interpreter.
        environment: what is added to ours.
    """

    def __init__(self, name: str, entry: Entry, python: str, environment: Mapping[str, str]) -> None:
        self.entry = entry
        self.hello: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        answers, its_answers = os.pipe()
        its_arrivals, self.arrivals = os.pipe()
        os.set_blocking(self.arrivals, False)
        self._answers = answers
        self._unread = b""
        variables = os.environ | {"OMP_NUM_THREADS": str(entry.threads)} | dict(environment)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.peers.child", name, str(its_answers), str(its_arrivals)],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=(its_answers, its_arrivals),
            start_new_session=True,
        )
        os.close(its_answers)
        os.close(its_arrivals)
        self._known: dict[int, str] = {}  # its processes, with the time each began: numbers are used again

    def ask(self, do: str, *, timeout: float, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.tell(do, **command)
        return self.answer(timeout=timeout, doing=do)

    def tell(self, do: str, **command: Any) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise FailedError(self._last_words()) from None

    def answer(self, *, timeout: float, doing: str = "start") -> dict[str, Any]:
        """The next answer.

        Raises:
            FailedError: it said so, it ended, or ``timeout`` seconds have passed.
        """
        end = monotonic() + timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - monotonic()))
            if not ready:
                raise FailedError(f"no answer to {doing!r} within {timeout:.0f} s")
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise FailedError(self._last_words())
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise FailedError(answer["failed"])
        return answer

    def greet(self, *, timeout: float) -> None:
        """Wait until it has imported torch."""
        self.hello = self.answer(timeout=timeout)

    def stop(self) -> None:
        """Let nothing of it run."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def seconds(self) -> float | None:
        """CPU seconds of all its processes so far; None where the system does not say."""
        found = [_stat(pid) for pid in self._members()]
        spent = [(int(stat[11]) + int(stat[12])) / TICK for stat in found if stat]
        return sum(spent) if spent else None

    def peak(self) -> float | None:
        """The largest resident memory of each of its processes, summed, in MiB."""
        total = 0
        for pid in self._members():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        return total / 1024 or None

    def end(self) -> None:
        """End all its processes."""
        members = self._members()
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        os.close(self._answers)
        os.close(self.arrivals)
        self._errors.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._members():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def _members(self) -> list[int]:
        """Its processes: those of its session and their descendants, also such as began a session of their own."""
        first = self._process.pid
        if sys.platform != "linux":
            return [first]
        found = {
            int(path.name): stat
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and (stat := _stat(path.name))
        }
        known = {pid: began for pid, began in self._known.items() if pid in found and found[pid][19] == began}
        for pid, stat in found.items():
            line = pid
            while line in found and line != first and line not in known and int(found[line][3]) != first:
                line = int(found[line][1])
            if line in found:
                known[pid] = stat[19]
        self._known = known
        return list(known)

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        code = self._process.returncode
        how = f"ended by signal {-code}" if code < 0 else f"ended with {code}"
        return f"{how}: {lines[-1][:160]}" if lines else how


def _stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat behind the name: state, parent, group, session, … 19: when it began."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
