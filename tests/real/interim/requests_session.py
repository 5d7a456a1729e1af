"""Two requests in one session of requests: prints what each got."""

import json
import sys

import requests

found = []
with requests.Session() as session:
    for url in sys.argv[1:]:
        try:
            response = session.post(url, data=b"1", headers={"Idempotency-Key": url}, timeout=3)
            found.append([response.status_code, response.text.strip()])
        except requests.RequestException as error:
            found.append(type(error).__name__)
print(json.dumps(found))
