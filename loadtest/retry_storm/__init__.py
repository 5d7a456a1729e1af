"""A retry storm, with and without oncegate: what retries cost, and who pays.

- `plan`: operations and the fate of each of their executions, computed from the seed alone;
- `upstream`: the API, in a process of its own; it executes, logs, and responds well or badly;
- `client`: clients that retry as clients should (a few times, exponential backoff, full jitter);
- `run`: both sides at the same time on the same machine, from the same seed;
- `report`: the table and the plot.
"""
