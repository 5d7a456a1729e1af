"""Drives real browsers without a screen: Chromium by its WebDriver, Firefox by its own Marionette. No other driver."""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHROMIUM_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--host-resolver-rules=MAP shop.test 127.0.0.1",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
# Nothing but the pages under test is asked for.
FIREFOX_PREFS: Mapping[str, object] = {
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.safebrowsing.downloads.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.homepage_override.mstone": "ignore",
    "datareporting.policy.dataSubmissionEnabled": False,
    "dom.confirm_repost.testing.always_accept": True,
    "extensions.update.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "network.dns.localDomains": "shop.test",
    "services.settings.server": "http://127.0.0.1:9/",
    "toolkit.telemetry.server": "http://127.0.0.1:9/",
}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
START_S = 60


class BrowserError(Exception):
    """The browser could not do it."""


class Browser:
    """One window, which waits for no page by itself: else nobody could click twice.

    `call` is one command of the WebDriver protocol, with the name that Marionette gives it.
    """

    name = ""

    def call(self, command: str, **parameters: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def go(self, url: str) -> None:
        """Leave the page there is, and begin with another one."""
        for one in ("about:blank", url):
            self.call("Navigate", url=one)
            deadline = time.monotonic() + START_S
            while self.call("GetCurrentURL") != one:
                assert time.monotonic() < deadline, f"{self.name} does not get to {one}"
                time.sleep(0.02)

    def reload(self) -> None:
        self.call("Refresh")

    def back(self) -> None:
        self.call("Back")

    def click(self, selector: str) -> None:
        self.call("ElementClick", id=self._element(selector))

    def write(self, selector: str, text: str) -> None:
        """Write a text into a field, in place of what it has."""
        element = self._element(selector)
        self.call("ElementClear", id=element)
        self.call("ElementSendKeys", id=element, text=text)

    def click_twice(self, selector: str, pause_s: float) -> None:
        """Click, and once more after a pause, whatever the first click led to by then."""
        element = {ELEMENT: self._element(selector)}
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        pause = {"type": "pause", "duration": int(pause_s * 1000)}
        moves = [{"type": "pointerMove", "x": 0, "y": 0, "origin": element}, down, up, pause, down, up]
        self.call("PerformActions", actions=[{"type": "pointer", "id": "mouse", "actions": moves}])

    def text(self, selector: str = "body") -> str:
        return str(self.call("GetElementText", id=self._element(selector)))

    def await_text(self, selector: str, wanted: str, seconds: float = START_S) -> None:
        """Wait until an element of the page has this text."""
        deadline, seen = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                seen = self.text(selector)
            except BrowserError as error:  # there is another page by now, or none yet
                seen = str(error)
            if seen == wanted:
                return
            time.sleep(0.05)
        raise AssertionError(f"{selector} has {seen!r}, not {wanted!r}")

    def set_scripts(self, *, enabled: bool) -> None:
        """Let pages run scripts or not, from the next page on."""
        raise NotImplementedError

    def set_dark(self, *, dark: bool) -> None:
        """Prefer dark colours or light ones."""
        raise NotImplementedError

    def evaluate(self, script: str) -> Any:
        """Return what the body of an async function returns, in the page."""
        done = "arguments[arguments.length - 1]"
        called = f"const done = {done}; (async () => {{ {script} }})().then(done, error => done('' + error));"
        return self.call("ExecuteAsyncScript", script=called, args=[])

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("TakeScreenshot"))

    def _element(self, selector: str) -> str:
        found = self.call("FindElement", using="css selector", value=selector)
        return str(found[ELEMENT])


class Firefox(Browser):
    """Firefox with an empty profile."""

    name = "firefox"

    def __init__(self, prefs: Mapping[str, object] | None = None, arguments: tuple[str, ...] = ()) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="ff"))
        port = free_port()
        chosen = {**FIREFOX_PREFS, "marionette.port": port, **(prefs or {})}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in chosen.items()]
        (self._profile / "user.js").write_text("\n".join(lines))
        self._process = subprocess.Popen(
            [
                "firefox-esr",
                "--headless",
                "--no-remote",
                "--profile",
                str(self._profile),
                "--marionette",
                "--remote-allow-system-access",
                *arguments,
            ],
            **quiet(self._profile),
        )
        self._number = 0
        self._socket = connect(port)
        self._receive()  # its greeting
        self.session = self._command("WebDriver:NewSession", {"pageLoadStrategy": "none"})

    def call(self, command: str, **parameters: Any) -> Any:
        result = self._command(f"WebDriver:{command}", parameters)
        return result.get("value", result) if isinstance(result, dict) and set(result) <= {"value"} else result

    def set_scripts(self, *, enabled: bool) -> None:
        self.set_pref("javascript.enabled", enabled)

    def set_dark(self, *, dark: bool) -> None:
        self.set_pref("layout.css.prefers-color-scheme.content-override", 0 if dark else 1)

    def set_pref(self, name: str, value: bool | int) -> None:
        """Change a preference of the running browser."""
        kind = "Bool" if isinstance(value, bool) else "Int"
        self._command("Marionette:SetContext", {"value": "chrome"})
        script = f"Services.prefs.set{kind}Pref(arguments[0], arguments[1])"
        self.call("ExecuteScript", script=script, args=[name, value])
        self._command("Marionette:SetContext", {"value": "content"})

    def _command(self, name: str, parameters: Mapping[str, Any]) -> Any:
        self._number += 1
        message = json.dumps([0, self._number, name, parameters]).encode()
        self._socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._receive()
        if error:
            raise BrowserError(f"{name}: {error['error']}: {error['message']}")
        return result

    def _receive(self) -> Any:
        length = b""
        while (one := self._socket.recv(1)) != b":":
            assert one, "the browser ended"
            length += one
        data = b""
        while len(data) < int(length):
            part = self._socket.recv(int(length) - len(data))
            assert part, "the browser ended"
            data += part
        return json.loads(data)

    def close(self) -> None:
        self._socket.close()
        end(self._process)
        shutil.rmtree(self._profile, ignore_errors=True)


# The commands of the protocol, as paths: the method, the path, and which parameter is in it.
PATHS = {
    "Navigate": ("POST", "url"),
    "Refresh": ("POST", "refresh"),
    "Back": ("POST", "back"),
    "FindElement": ("POST", "element"),
    "ElementClick": ("POST", "element/{id}/click"),
    "ElementClear": ("POST", "element/{id}/clear"),
    "ElementSendKeys": ("POST", "element/{id}/value"),
    "GetElementText": ("GET", "element/{id}/text"),
    "ExecuteAsyncScript": ("POST", "execute/async"),
    "PerformActions": ("POST", "actions"),
    "GetCurrentURL": ("GET", "url"),
    "TakeScreenshot": ("GET", "screenshot"),
    "SetWindowRect": ("POST", "window/rect"),
    "GetCookies": ("GET", "cookie"),
    "DeleteAllCookies": ("DELETE", "cookie"),
    "SetTimeouts": ("POST", "timeouts"),
}


class Chromium(Browser):
    """Chromium with an empty profile."""

    name = "chromium"

    def __init__(self, arguments: tuple[str, ...] = (), options: Mapping[str, object] | None = None) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="cr"))
        port = free_port()
        self._process = subprocess.Popen(["chromedriver", f"--port={port}"], **quiet(self._profile))
        connect(port).close()
        self._url = f"http://127.0.0.1:{port}/session"
        args = [*CHROMIUM_FLAGS, f"--user-data-dir={self._profile / 'data'}", *arguments]
        chosen = {
            "pageLoadStrategy": "none",
            "goog:chromeOptions": {"args": args, "binary": "/usr/bin/chromium", **(options or {})},
        }
        self.session = self._ask("POST", "", {"capabilities": {"alwaysMatch": chosen}})
        self._url += f"/{self.session['sessionId']}"

    def call(self, command: str, **parameters: Any) -> Any:
        method, path = PATHS[command]
        if "{id}" in path:
            path = path.format(id=parameters.pop("id"))
        return self._ask(method, f"/{path}", parameters)

    def set_scripts(self, *, enabled: bool) -> None:
        self.devtools("Emulation.setScriptExecutionDisabled", value=not enabled)

    def set_dark(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def set_size(self, width: int, height: int) -> None:
        """Show pages in a window of this size."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def console(self) -> list[str]:
        """Return the warnings and errors in the console since the last call."""
        return [str(entry["message"]) for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _ask(self, method: str, path: str, parameters: Mapping[str, Any]) -> Any:
        data = json.dumps(parameters).encode() if method == "POST" else None
        asked = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=START_S) as answer:
                return json.loads(answer.read())["value"]
        except urllib.error.HTTPError as error:
            value = json.loads(error.read())["value"]
            raise BrowserError(f"{path}: {value['error']}: {value['message'].splitlines()[0]}") from None

    def close(self) -> None:
        try:
            self._ask("DELETE", "", {})
        finally:
            end(self._process)
            shutil.rmtree(self._profile, ignore_errors=True)


def quiet(home: Path) -> dict[str, Any]:
    """Return options of a process that prints nothing, and leaves nothing outside its own folder."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(home), "LANG": "C.UTF-8"}
    env["MOZ_CRASHREPORTER_DISABLE"] = "1"
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": env}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def connect(port: int) -> socket.socket:
    """Return a connection to a program that is about to listen."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=START_S)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
