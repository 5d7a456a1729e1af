"""Older builds of oncegate on the same store: what they write, what they do with it, and how to run one."""
