"""The rules file, and the policy that it gives to each request."""
