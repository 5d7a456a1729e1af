"""What a rule asks the API about a key with an unknown outcome, and what its answers mean. Pure but for one file."""
