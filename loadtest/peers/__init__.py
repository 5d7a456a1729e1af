"""What oncegate is measured against: the same job done the obvious way, and what a proxy without the job costs."""
