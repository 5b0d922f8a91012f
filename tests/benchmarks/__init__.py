"""Benchmarks of quotalimit and its peers: `python -m tests.benchmarks`.

Every case runs in the same process, in many short rounds that take turns, with the garbage collector off inside a
round. What counts is the process's own time on the processor, also that of its other threads, so that what else runs
on the machine does not; but for threads that wait for one another it is the time on the wall. A figure is the median
of its rounds; a ratio is the median of each round's own ratio, so that a machine that speeds up or slows down does so
for both.
"""
