"""Whether claims can succeed at a store: `breaker.py` stops those that fail one after the other."""
