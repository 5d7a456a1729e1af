"""Two requests in one client of httpx: prints what each got."""

import json
import sys

import httpx

found = []
with httpx.Client(timeout=3) as client:
    for url in sys.argv[1:]:
        try:
            response = client.post(url, content=b"1", headers={"Idempotency-Key": url})
            found.append([response.status_code, response.text.strip()])
        except httpx.HTTPError as error:
            found.append(type(error).__name__)
print(json.dumps(found))
