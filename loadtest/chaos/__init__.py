"""The chaos test: faults of every kind under load, and an independent program that judges the result.

- `link`: TCP links that fail on demand, on every connection of the run;
- `plan`: the requests and the upstream's responses, computed from the seed alone;
- `wire`, `client`: clients that retry, race, disconnect and reuse keys, and log every response;
- `upstream`: the API behind the proxy; it logs every execution, and responds well or badly;
- `parts`: the processes; `redis_stores`, `postgres_stores`: the store and how it breaks; `faults`: what else does, and
  when; `run`: all of it together;
- `watch`: detects times in which the machine itself stalled a process;
- `check`: the judge. It imports nothing of the above. It reads only the logs of clients and upstream, the list of
  faults, and the proxies' reports of lost claims;
- `report`: figures, the timeline of faults, a plot.
"""
