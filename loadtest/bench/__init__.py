"""The benchmark: oncegate and its peers in turn on one core, the load, the upstream and Redis on another.

`machine` starts and pins processes and reads their CPU time; `contenders` says how each one is started; `wrk` makes
the load; `scenarios` says what is asked of whom; `table` prints and keeps what came out. Two shared cores are enough:
the ratios are what counts, and CPU time a request survives a busy machine better than requests a second.
"""
