"""Headless Chromium, driven through its debugging socket: what a page measures, how it looks."""

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Browser:
    """A browser with one tab; a context manager."""

    def __enter__(self):
        from websocket import create_connection

        # the browser may still write to it when it is asked to end
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            + ["--remote-debugging-port=0", "--remote-allow-origins=*", "--mute-audio"]
            + ["--disable-background-networking", f"--user-data-dir={self._profile.name}"]
            + ["about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = Path(self._profile.name) / "DevToolsActivePort"
        end = time.monotonic() + 30
        while not (port_file.exists() and port_file.read_text().strip()):
            if time.monotonic() > end:
                self.__exit__()
                raise RuntimeError("the browser did not start within 30 s")
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        self._socket = create_connection(tab["webSocketDebuggerUrl"], timeout=60)
        self._numbers = itertools.count(1)
        self.call("Page.enable")
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(timeout=20)
        self._profile.cleanup()

    def call(self, method: str, **parameters) -> dict:
        """One command of the Chrome DevTools Protocol, and its answer."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, page: Path, *, width: int, dark: bool = False, fragment: str = "") -> None:
        """Show a page from its file at a width in CSS pixels, and wait for it and its formulas."""
        scheme = "dark" if dark else "light"
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.resolve().as_uri() + fragment)
        end = time.monotonic() + 30
        ready = (
            "document.readyState === 'complete' && "
            "(!window.MathJax || !MathJax.startup || window.__typeset === true || "
            "(MathJax.startup.promise.then(() => { window.__typeset = true }), false))"
        )
        while self.run(ready) is not True and time.monotonic() < end:
            time.sleep(0.1)

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save what the page looks like as a PNG, the whole of it or the first screen."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
