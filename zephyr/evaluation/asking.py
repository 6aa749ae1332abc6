"""Many questions at once, with a line now and then that says how far they are."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from zephyr.feedback.client import Client
from zephyr.progress import Lines

T = TypeVar("T")

_LOOK = 0.5  # seconds


async def all_of(client: Client, what: str, works: Sequence[Awaitable[T]]) -> list[T]:
    """What comes of each, in their order. The first error is raised, and the others stop with it."""
    lines, done = Lines(), 0

    async def counted(work: Awaitable[T]) -> T:
        nonlocal done
        result = await work
        done += 1
        return result

    async def follow() -> None:
        while True:
            await asyncio.sleep(_LOOK)
            if lines.due():
                lines.say(f"{what}: {done:,}/{len(works):,}  {_figures(client)}")

    following = asyncio.create_task(follow())
    try:
        return await asyncio.gather(*(counted(work) for work in works))
    finally:
        following.cancel()


def _figures(client: Client) -> str:
    tally = client.tally
    failures = tally.failures.total()
    spent = f"  {tally.cost + tally.waste:.4f} USD" if tally.cost + tally.waste else ""
    return f"{client.in_flight} in flight{spent}" + (f"  {failures} failures" if failures else "")
