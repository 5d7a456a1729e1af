"""The life of the process: start, workers, signals, and the embedded store beside it."""
