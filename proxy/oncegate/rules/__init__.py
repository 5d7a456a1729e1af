"""What an operator wrote: the rules file, and the policy for each request."""
