"""One worker: builds its parts, runs them, drains them."""
