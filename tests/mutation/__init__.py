"""Mutation testing: changes the code in small ways, one at a time, and tells which changes no test notices.

    python -m tests.mutation quotalimit/stores/charges.py

Each mutant is tried in a copy of the repository, by the tests that run what it changes, the fastest first, so that the
working tree is never touched. A mutant is killed by a test that fails, or by tests that take far longer than they do on
the code as it is. Those that no test need notice are in `explained.toml`, each with its reason.
"""
