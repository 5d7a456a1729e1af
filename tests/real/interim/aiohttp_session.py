"""Two requests in one session of aiohttp: prints what each got."""

import asyncio
import json
import sys

import aiohttp


async def main() -> None:
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(3)) as session:
        for url in sys.argv[1:]:
            try:
                async with session.post(url, data=b"1", headers={"Idempotency-Key": url}) as response:
                    found.append([response.status, (await response.text()).strip()])
            except (aiohttp.ClientError, TimeoutError) as error:
                found.append(type(error).__name__)
    print(json.dumps(found))


asyncio.run(main())
