"""Reads the rate limit headers of a response back, with a Structured Fields parser that is not ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import http_sf

Policies = dict[str, dict[str, Any]]
"""The parameters of each policy, by its name."""


def read(headers: Mapping[str, str], field: str) -> Policies:
    """The items of a field. Fails for what is not a List of Strings of different names with parameters."""
    items: Any = http_sf.parse(headers[field].encode("ascii"), tltype="list")
    policies = dict(items)
    assert all(type(name) is str for name in policies)
    assert len(policies) == len(items)
    return policies


def limits(headers: Mapping[str, str]) -> Policies:
    """`RateLimit`: what is left, and until when. Every policy is one that `RateLimit-Policy` describes."""
    left = read(headers, "RateLimit")
    assert left.keys() <= read(headers, "RateLimit-Policy").keys()
    return left


def policies(headers: Mapping[str, str]) -> Policies:
    """`RateLimit-Policy`: what is limited to how much."""
    return read(headers, "RateLimit-Policy")
