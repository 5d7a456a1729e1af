"""The proof: everything that can break is broken under load, and a program of its own judges what was seen.

- `link`: TCP links that fail on demand; they stand on every connection;
- `plan`: what is asked and answered, made from the seed alone;
- `wire`, `client`: clients that retry, race, leave and mutate, and write down what they got;
- `upstream`: the API behind the proxy; it writes down every execution, and answers well or badly;
- `parts`: the processes; `faults`: what is done to them, and when; `run`: all of it together;
- `watch`: whether the machine itself stood still;
- `check`: the judge. It imports nothing of the above and reads only what clients and upstream wrote down,
  the list of faults, and what the proxies reported of lost claims;
- `report`: figures, the timeline of faults, a plot.
"""
