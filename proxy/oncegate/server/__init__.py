"""Process life: start-up, worker processes, signals, and the embedded store that runs beside them."""
