"""python -m quotalimit: three layers on a function that calls a model, and several users who pass them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from quotalimit import LimitExceeded, Usage, ip_key, limiters_of, rate_limited, token_budget


@dataclass
class Request:
    """What a web framework would hand to the function."""

    host: str


@dataclass
class Response:
    """What a model would answer, with the tokens that it counts."""

    text: str
    usage: Usage


def by_ip(request: Request) -> str:
    return ip_key(request.host)


@rate_limited("100/minute", key=by_ip)
@rate_limited("20/minute", key="user")
@token_budget("10_000/day", key="user")
def chat(request: Request, user: str, prompt: str) -> Response:
    """Stands for a call to a model: it answers at once, and counts a token for each word."""
    words = len(prompt.split())
    return Response(f"{words} words, {user}", Usage(input_tokens=words, output_tokens=4))


@dataclass
class Caller:
    """One user, where she calls from, and what she asks."""

    user: str
    host: str
    prompts: Sequence[str]
    answered: int = 0
    refusals: list[LimitExceeded] = field(default_factory=list[LimitExceeded])

    def run(self) -> None:
        for prompt in self.prompts:
            try:
                chat(Request(self.host), self.user, prompt)
                self.answered += 1
            except LimitExceeded as refusal:
                self.refusals.append(refusal)


CALLERS = [
    Caller("alice", "198.51.100.1", ["What is a token?"] * 25),
    Caller("bob", "198.51.100.2", ["word " * 3_000] * 6),
    Caller("carol", "2001:db8::17", ["Good morning"] * 5),
    *(Caller(f"bot-{number}", "203.0.113.9", ["spam"] * 18) for number in range(1, 7)),
]


def main() -> None:
    print("Limits, the outermost first:")
    for limiter in limiters_of(chat):
        print(f"  {limiter}")
    print(f"\n{len(CALLERS)} users call at once ...")
    with ThreadPoolExecutor(len(CALLERS)) as pool:
        list(pool.map(Caller.run, CALLERS))

    print("\nWhat the refused callers caught, once for each:")
    for caller in CALLERS:
        if caller.refusals:
            _show(caller, caller.refusals[0])

    print("\nThe budgets now:")
    budget = limiters_of(chat)[-1]
    row = "  {:<8} {:>8} {:>8}  {:<20} {:>6} {:>9}  {}"
    print(row.format("user", "answered", "refused", "by", "used", "remaining", "whole again"))
    for caller in CALLERS:
        left = budget.peek(caller.user)
        by = Counter(type(refusal).__name__ for refusal in caller.refusals)
        whole_again = f"{left.reset_at:%Y-%m-%d %H:%M} UTC"
        print(
            row.format(caller.user, caller.answered, by.total(), ", ".join(by), left.used, left.remaining, whole_again)
        )
    print("\nEach user pays for what she used; a refused call costs nothing and never reaches the model.")


def _show(caller: Caller, refusal: LimitExceeded) -> None:
    print(f"  {caller.user}: {type(refusal).__name__}: {refusal}")
    print(
        f"      limit={refusal.limit} requested={refusal.requested} used={refusal.used} "
        f"remaining={refusal.remaining} reason={refusal.reason}"
    )
    print(
        f"      retry_after={refusal.retry_after} reset_at={refusal.reset_at:%Y-%m-%d %H:%M:%S} UTC key={refusal.key!r}"
    )


if __name__ == "__main__":
    main()
