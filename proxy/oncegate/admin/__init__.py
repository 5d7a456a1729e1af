"""The admin listener: metrics, health, and what an operator sees in a browser. Never on the public port."""
