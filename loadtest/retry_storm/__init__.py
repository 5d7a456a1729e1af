"""A retry storm, with and without oncegate: what do retries cost, and who pays?

- `plan`: operations and what goes wrong with each of their executions, made from the seed alone;
- `upstream`: the API, in a process of its own; it does the work, writes it down, and answers well or badly;
- `client`: clients that retry as clients should (a few times, exponential backoff, full jitter);
- `run`: both sides at the same time on the same machine, from the same seed;
- `report`: the table and the plot.
"""
