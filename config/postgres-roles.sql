-- The role that the proxies connect as. It owns nothing: `oncegate migrate` gives it its rights.
CREATE ROLE oncegate LOGIN PASSWORD 'oncegate';
