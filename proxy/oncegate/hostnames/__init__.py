"""Host names and the addresses behind them: looked up for the upstreams and for the store, and kept for a moment."""
