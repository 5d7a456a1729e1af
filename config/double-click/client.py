"""A form that is sent twice at once, and again when no answer comes, with no key at all.

python -m config.double-click.client http://127.0.0.1:8080/orders item=7
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from config.clients.sending import Outcome, Patience, Result, send

# All tries have to begin within the rule's window, 10 s: 3 of at most 2 s, with pauses of at most 0.5 and 1 s.
PATIENCE = Patience(tries=3, timeout_s=2.0, longest_retry_after_s=1.0)


def click(url: str, form: bytes) -> Result:
    """Send the form as a browser of one session does: nothing but the session tells whose it is."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": "session=4711"}
    return send(url, form, headers, PATIENCE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m config.double-click.client")
    parser.add_argument("url")
    parser.add_argument("form", help="the fields, such as item=7&size=M")
    parser.add_argument("--clicks", type=int, default=2)
    asked = parser.parse_args()
    with ThreadPoolExecutor(asked.clicks) as fingers:
        results = list(fingers.map(lambda _: click(asked.url, asked.form.encode()), range(asked.clicks)))
    for result in results:
        told = result.answer.body.decode() if result.answer else ""
        print(result.outcome.value, result.answer.status if result.answer else "-", told, flush=True)
    return 0 if all(result.outcome is Outcome.ANSWERED for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
