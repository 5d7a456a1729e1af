"""An LLM's API that says one word at a time, when it is told to, and counts who asks it; and pages that show it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
# A page that asks once, keeps the address of the answer, and reads there after a reload.
RELOADED = """<!DOCTYPE html><title>Chat</title><pre id="text"></pre><p id="state">begins</p>
<script type="module">
const text = document.querySelector("#text"), state = document.querySelector("#state");
const loads = sessionStorage.loads = Number(sessionStorage.loads ?? 0) + 1;
let address = sessionStorage.getItem("address"), answer;
if (address) {
  answer = await fetch(address);
} else {
  answer = await fetch("/v1/chat", {method: "POST", headers: {"Idempotency-Key": crypto.randomUUID()}, body: "hi"});
  address = answer.headers.get("Link").match(/<([^>]+)>; rel="resume"/)[1];
  sessionStorage.setItem("address", address);
}
const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
let came = "";
for (let one = await reader.read(); !one.done; one = await reader.read()) {
  came += one.value;
  text.textContent = [...came.matchAll(/^data: (.*)$/gm)].map(found => found[1]).join(" ");
}
state.textContent = `whole in load ${loads}`;
</script>"""
# A page that listens at an address.
LISTENING = """<!DOCTYPE html><title>Listen</title><pre id="text"></pre><p id="state">begins</p>
<script>
const text = document.querySelector("#text"), state = document.querySelector("#state");
const source = new EventSource(new URLSearchParams(location.search).get("address"));
source.onopen = () => { state.textContent = "open"; };
source.onmessage = event => { text.textContent += (text.textContent && " ") + event.data; };
source.onerror = () => { state.textContent = source.readyState === EventSource.CLOSED ? "closed" : "connecting"; };
</script>"""
# A page with a program that is bundled for it.
BUNDLED = """<!DOCTYPE html><title>Chat</title><main></main><script type="module" src="/bundle.js"></script>"""
PAGES = {"/reloaded": RELOADED, "/listening": LISTENING, "/bundled": BUNDLED}


class Chat:
    """The API. Each word leaves once `say` has let it. `calls` has the body of each call; `bundle` is its program."""

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[bytes] = []
        self.bundle = b""
        self.words = threading.Semaphore(0)

    def say(self, count: int) -> None:
        """Let so many further words leave."""
        self.words.release(count)

    def events(self) -> Iterator[bytes]:
        """Yield the events of an answer."""
        for number, word in enumerate(WORDS):
            self.words.acquire()
            yield b"id: %d\ndata: %s\n\n" % (number, word.encode())

    def parts(self) -> Iterator[bytes]:
        """Yield the events of an answer as the AI SDK has them: its UI message stream."""
        yield from map(_part, ({"type": "start"}, {"type": "text-start", "id": "t"}))
        for word in WORDS:
            self.words.acquire()
            yield _part({"type": "text-delta", "id": "t", "delta": f"{word} "})
        yield from map(_part, ({"type": "text-end", "id": "t"}, {"type": "finish"}))
        yield b"data: [DONE]\n\n"


def _part(part: dict[str, str]) -> bytes:
    return b"data: %s\n\n" % json.dumps(part).encode()


@contextmanager
def chatting() -> Iterator[Chat]:
    """Run the API in a thread of this process."""
    chat = Chat()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": chat}))
    chat.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield chat
    finally:
        chat.say(1000)
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """The proxy resets connections that it closes."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    chat: Chat

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        is_program = path == "/bundle.js"
        page = self.chat.bundle if is_program else PAGES.get(path, "").encode()
        self.send_response(200 if page else 404)
        self.send_header("Content-Type", "text/javascript" if is_program else "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def do_POST(self) -> None:
        self.chat.calls.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in self.chat.parts() if self.path == "/v1/ui" else self.chat.events():
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""
