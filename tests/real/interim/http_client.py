"""Two requests on one connection of http.client: prints what each got."""

import http.client
import json
import sys
from urllib.parse import urlsplit

found = []
connection = http.client.HTTPConnection(urlsplit(sys.argv[1]).netloc, timeout=3)
for url in sys.argv[1:]:
    try:
        connection.request("POST", urlsplit(url).path, b"1", {"Idempotency-Key": url})
        response = connection.getresponse()
        found.append([response.status, response.read().decode().strip()])
    except OSError as error:
        found.append(type(error).__name__)
print(json.dumps(found))
