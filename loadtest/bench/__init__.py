"""The benchmark: oncegate and its peers take turns on one core; load, upstream and Redis use another.

`machine` starts and pins processes and reads their CPU time. `contenders` starts each contender, `wrk` makes the load,
`scenarios` defines the requests, and `table` prints and stores the results. Two shared cores are enough: the ratios
count, and CPU time per request is less sensitive to a busy machine than requests per second.
"""
