"""What `serve` and `pull` tell whoever started them: lines for people, or JSON lines for programs.

Everything goes to stderr except JSON, so that a pipe gets the machine-readable half alone.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

from mlx_serving.errors import ConfigError
from mlx_serving.host import Finding
from mlx_serving.types import ModelInfo

if TYPE_CHECKING:
    from mlx_serving.catalog.progress import Progress

REPEAT_S = 5.0
"""Between two plain lines about the same download."""


class Say:
    """Args: as_json: one JSON object a line on `out`; otherwise text on `err`."""

    def __init__(
        self, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self._out = out or sys.stdout
        self.err = err or sys.stderr

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """One thing that happened, in the form that was asked for."""
        if self.as_json:
            print(json.dumps({"event": kind, **fields}), file=self._out, flush=True)
        elif text:
            print(text, file=self.err, flush=True)

    def error(self, code: str, message: str, remedy: str | None = None) -> None:
        text = f"error: {message}" + (f"\n  {remedy}" if remedy else "")
        self.event("error", text, code=code, message=message, remedy=remedy)

    def warning(self, code: str, message: str) -> None:
        self.event("warning", f"warning: {message}", code=code, message=message)

    def config_error(self, error: ConfigError) -> None:
        """One line a mistake; each names its place."""
        busy = error.code == "address_unavailable"
        remedy = "stop what listens there, or choose another with --port or --uds" if busy else None
        for line in error.message.splitlines():
            self.error(error.code, line, remedy)

    def unable(self, findings: list[Finding]) -> None:
        """This host cannot work, and why."""
        for finding in findings:
            if finding.level == "fail":
                self.error(finding.code, finding.message, finding.remedy)

    def listening(self, address: str, model: str, *, needs_key: bool = False) -> None:
        """What to try. `address` is a URL, or `unix:PATH`."""
        uds = address.removeprefix("unix:") if address.startswith("unix:") else None
        url = "http://localhost" if uds else address
        message = {"role": "user", "content": "What is the capital of France?"}
        body = json.dumps({"model": model, "messages": [message], "temperature": 0})
        key = "YOUR_KEY" if needs_key else "none"
        auth = f" -H 'Authorization: Bearer {key}'" if needs_key else ""
        lines = [
            f"mlx-serving is listening on {uds or url}",
            f"  try      curl{f' --unix-socket {uds}' if uds else ''} {url}/v1/chat/completions \\",
            f"             -H 'Content-Type: application/json'{auth} -d '{body}'",
            f'  openai   OpenAI(base_url="{url}/v1", api_key="{key}")',
            f"  health   {url}/health",
            f"  metrics  {url}/metrics",
            f"  docs     {url}/docs",
        ]
        if uds:
            transport = f'httpx.Client(transport=httpx.HTTPTransport(uds="{uds}"))'
            lines[3] = lines[3].replace(f'"{key}")', f'"{key}", http_client={transport})')
        self.event("listening", "\n".join(lines), url=url, uds=uds, model=model)

    def loaded(self, info: ModelInfo) -> None:
        kind = ", ".join(part for part in (info.quantization, info.dtype) if part)
        if info.adapter_of is not None:
            kind = f"beside {info.adapter_of}"
        kv = "" if info.kv_bits == "off" else f"KV in {info.kv_bits} bits, "
        self.event(
            "model_loaded",
            f"{info.model_id} is ready: {size(info.weight_bytes)} of weights"
            f"{f' ({kind})' if kind else ''}, "
            f"{kv}kernels {info.kernels}, loaded in {info.load_s:.1f} s",
            model=info.model_id,
            architecture=info.architecture,
            weight_bytes=info.weight_bytes,
            kv_bits=info.kv_bits,
            load_s=info.load_s,
            context_length=info.context_length,
        )

    def progress(self) -> Progress:
        """A bar on a terminal, a line every few seconds elsewhere."""
        if not self.as_json and self.err.isatty():
            return BarProgress(self.err)
        return LineProgress(self)


def size(count: float) -> str:
    """`144.5 MB`, decimal as download pages and disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class LineProgress:
    """A line at the start, every `REPEAT_S` and at the end."""

    def __init__(self, say: Say, clock: Any = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._task = ""
        self._total = self._done = 0
        self._said_s = 0.0

    def start(self, task: str, total_bytes: int) -> None:
        self._task, self._total, self._done = task, total_bytes, 0
        self._tell()

    def advance(self, n: int) -> None:
        self._done += n
        if self._clock() - self._said_s >= REPEAT_S:
            self._tell()

    def finish(self) -> None:
        self._done = max(self._done, self._total)
        self._tell()

    def _tell(self) -> None:
        self._said_s = self._clock()
        of = f" of {size(self._total)}" if self._total else ""
        self._say.event(
            "progress",
            f"{self._task}: {size(self._done)}{of}",
            task=self._task,
            bytes=self._done,
            total_bytes=self._total,
        )


class BarProgress:
    """A rich progress bar; rich is imported when there is something to show."""

    def __init__(self, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self._lock = threading.Lock()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=file),
        )
        self._task: Any = None

    def start(self, task: str, total_bytes: int) -> None:
        with self._lock:
            self._bar.start()
            self._task = self._bar.add_task(task, total=total_bytes or None)

    def advance(self, n: int) -> None:
        with self._lock:
            if self._task is not None:
                self._bar.advance(self._task, n)

    def finish(self) -> None:
        with self._lock:
            self._bar.stop()
            self._task = None
