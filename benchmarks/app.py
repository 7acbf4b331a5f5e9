"""The page with 100,000 items: seconds of the first page and of the others, and the server's bytes.

    python -m benchmarks.app --out DIR [--items 100000] [--browser /usr/bin/chromium]

The items are small images in a store, with a score each. The server is in a process of its own,
as ``lifelong ui`` starts it; what is read is its peak of memory. Each reading of a page is beside
one of a static file of the same server, so that the ratio says what the page adds. --browser goes
through the same pages in Chromium, too, and reads the bytes of its processes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import torch

from lifelong.data import Batch
from lifelong.memory import remember
from lifelong.runs import log, versions
from lifelong.store import open_store

PATHS = {
    "first page": "/memory",
    "sorted by lambda": "/memory?sort=lambda",
    "of one class": "/memory?label=3&sort=residual",
    "page 1,000": "/memory?page=1000",
    "an item": "/items/777",
    "a picture": "/items/777/picture",
}
STATIC = "/static/app.css"


@dataclass(frozen=True)
class Config:
    """All settings; the smoke setting of a test is another one of these. pages: of the gallery that
    are scrolled through, with their pictures; browsed: in the browser, until its caches are full.
    """

    items: int = 100_000
    side: int = 8
    rounds: int = 11
    pages: int = 40
    browsed: int = 200


def fill(folder: Path, config: Config) -> None:
    """The store, ten thousand items at a time."""
    g = torch.Generator().manual_seed(0)
    with open_store(folder, "a") as store:
        for start in range(0, config.items, 10_000):
            n = min(10_000, config.items - start)
            x = torch.randint(0, 256, (n, 1, config.side, config.side), generator=g)
            ids = torch.arange(start, start + n)
            batch = Batch(x.to(torch.uint8), ids % 10, ids)
            memory = remember(batch, torch.randn(n, 10, generator=g), task=start // 10_000)
            store.append(memory, scores={"leverage": torch.rand(n, generator=g)})


class Server:
    """``lifelong ui`` in a process."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-m", "lifelong", "ui", str(folder)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        address = ""
        for line in self.process.stdout or ():
            if found := re.search(r"http://\S+", line):
                address = found[0]
                break
        parts = urlsplit(address)
        self.connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=600)
        self.address, self.cookie = address, ""
        try:
            _, headers, _ = self.get(f"/?{parts.query}")
            self.cookie = headers["set-cookie"].split(";")[0]
        except BaseException:
            self.close()
            raise

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.connection.request("GET", path, headers={"Cookie": self.cookie})
        answer = self.connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read()

    def seconds(self, path: str) -> float:
        start = time.perf_counter()
        status, _, _ = self.get(path)
        took = time.perf_counter() - start
        if status != 200:
            raise RuntimeError(f"{path} was answered with {status}")
        return took

    def memory(self, name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
        raise OSError(f"the system does not tell {name} of a process")

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


def browser_bytes(browser: str) -> int:
    """Of the browser's processes among those that this one began, and those began: the sum of what
    each has of its own. The driver is left out: it keeps a record of every request."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(status.parent.name)] = int(fields[1])
    mine, total = {os.getpid()}, 0
    while more := {p for p, parent in parents.items() if parent in mine} - mine:
        mine |= more
    for process in mine - {os.getpid()}:
        try:
            if not Path(f"/proc/{process}/comm").read_text().startswith(Path(browser).name[:6]):
                continue
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(x.split()[1]) for x in lines if x.startswith("Private_"))
    return total


def browsed(server: Server, config: Config, browser: str) -> dict[str, Any]:
    """Chromium's bytes on the way through the pages by the link that people click, each until its
    last picture is there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page()
        session = page.context.new_cdp_session(page)
        page.goto(server.address)
        each, blank = [], 0
        ready = "[...document.images].every((i) => i.complete && i.naturalWidth > 0)"
        for number in range(config.browsed):
            page.evaluate("document.querySelectorAll('img').forEach((i) => i.loading = 'eager')")
            while not page.evaluate(ready):  # wait_for_function is not let by the page's own policy
                page.wait_for_timeout(20)
            blank += page.locator(".gallery img").count() == 0
            session.send("HeapProfiler.collectGarbage")  # what is alive, not what is not yet swept
            heap = session.send("Runtime.getHeapUsage")["usedSize"]
            each.append({"processes": browser_bytes(browser), "heap": int(heap)})
            if number + 1 < config.browsed:
                page.locator("a[rel=next]").click()
        opened.close()
    at = sorted({round(i * (len(each) - 1) / 8) for i in range(9)})
    return {"pages": config.browsed, "blank": blank, "after": {str(i + 1): each[i] for i in at},
            "largest": max(x["processes"] for x in each)}  # fmt: skip


def run(config: Config, out: Path, browser: str | None = None) -> dict[str, Any]:
    """Measure, and write the record."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "store"
        fill(folder, config)
        server = Server(folder)
        try:
            found: dict[str, Any] = {"cold": server.seconds(PATHS["first page"])}
            for name, path in PATHS.items():
                server.seconds(path)
                pairs = [
                    (server.seconds(path), server.seconds(STATIC)) for _ in range(config.rounds)
                ]
                page, static = (median(times) for times in zip(*pairs, strict=True))
                found[name] = {"seconds": page, "static": static, "ratio": page / static}
            before, blank = server.memory("VmRSS"), 0
            for number in range(1, config.pages + 1):
                _, _, body = server.get(f"/memory?page={number}")
                pictures = re.findall(r'src="(/items/\d+/picture)"', body.decode())
                blank += not pictures
                for picture in pictures:
                    server.seconds(picture)
            found["scrolled"] = {
                "pages": config.pages,
                "blank": blank,
                "before": before,
                "after": server.memory("VmRSS"),
                "peak": server.memory("VmHWM"),
            }
            if browser is not None:
                found["browser"] = browsed(server, config, browser)
        finally:
            server.close()
    for name, value in found.items():
        log(out, f"{name}: {value}")
        print(f"{name}: {value}", flush=True)
    for name, value in (
        ("result.json", found),
        ("config.json", asdict(config)),
        ("versions.json", versions()),
    ):
        (out / name).write_text(json.dumps(value, indent=1) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=Config.items)
    parser.add_argument("--browser", help="Chromium's executable; needs the extra test-ui")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    run(Config(items=given.items), given.out, given.browser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
