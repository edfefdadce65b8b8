"""bench/step_torch.py in a process of its own, which imports torch once and measures a shape when asked."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading


class TorchPeer:
    """The process; it answers every shape, with an error if need be."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.step_torch", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.rows: queue.Queue[str] = queue.Queue()
        self.complaint, self.ready = "", False
        threading.Thread(target=self._read_rows, daemon=True).start()
        threading.Thread(target=self._read_complaints, daemon=True).start()

    def _read_rows(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.ready = True
            if line.startswith("{"):
                self.rows.put(line)
        self.rows.put("")  # the end

    def _read_complaints(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.complaint = line.strip() or self.complaint

    def is_ready(self) -> bool:
        """It has imported torch, or has ended: measure will not wait for that."""
        return self.ready or self.process.poll() is not None

    def measure(self, shape: tuple[int, int, int], seconds: float = 60) -> dict:
        """The row of a shape; nothing else may run on the GPU meanwhile."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("x".join(map(str, shape)) + "\n")
            self.process.stdin.flush()
            line = self.rows.get(timeout=seconds)
        except (OSError, queue.Empty) as error:
            return {"error": self.complaint or type(error).__name__}
        return json.loads(line) if line else {"error": self.complaint or "it ended"}

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
