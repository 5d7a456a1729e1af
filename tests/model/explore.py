"""A search through every order of events around one key, breadth first: the story that it finds is the shortest.

python -m tests.model.explore "without NOT_AFTER"       tells how a promise breaks
"""

import sys
from typing import NamedTuple

from tests.model import rules
from tests.model.key import Key
from tests.model.variants import SETTINGS, VARIANTS
from tests.model.world import Owner, Setting, World, at_rest


class Found(NamedTuple):
    """What a search found: what broke first, how it came about, and how much was looked at."""

    broken: str
    story: list[str]
    worlds: int
    calls: dict[tuple[object, ...], rules.Done]


def explore(setting: Setting, cut: rules.Cut = frozenset(), wanted: set[str] | None = None) -> Found:
    """Search everything; stop at the first breach, or the first that is `wanted`."""
    key = Key(setting, cut)
    start = World((Owner(),) * len(setting.modes))
    came: dict[World, tuple[World, str] | None] = {start: None}
    front = [start]
    for world in front:
        resting = True
        for step in key.steps(world):
            resting = resting and not step.certain
            if step.broken and (wanted is None or step.broken in wanted):
                return Found(step.broken, [*story(came, world), step.story], len(came), key.calls)
            if step.world not in came:
                came[step.world] = (world, step.story)
                front.append(step.world)
        if resting and (broken := at_rest(world)) and (wanted is None or broken in wanted):
            return Found(broken, story(came, world), len(came), key.calls)
    return Found("", [], len(came), key.calls)


def story(came: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    """Return how a world came about."""
    told: list[str] = []
    while (before := came[world]) is not None:
        world, step = before
        told.append(step)
    return told[::-1]


def has_no_end(setting: Setting) -> bool:
    """Return whether what comes with time alone, without any chance, can go on for ever."""
    key = Key(setting, frozenset())
    front = [World((Owner(),) * len(setting.modes))]
    after: dict[World, list[World]] = {front[0]: []}
    before = dict.fromkeys(front, 0)  # how many certain steps lead there
    for world in front:
        for step in key.steps(world):
            if step.world not in after:
                after[step.world], before[step.world] = [], 0
                front.append(step.world)
            if step.certain:
                after[world].append(step.world)
                before[step.world] += 1
    # Whatever is left when all that nothing leads to is taken away, again and again, goes in a circle.
    ends = [world for world in front if not before[world]]
    for world in ends:
        for then in after[world]:
            before[then] -= 1
            if not before[then]:
                ends.append(then)
    return len(ends) < len(front)


def main(name: str) -> None:
    setting, cut, breaks = VARIANTS[name]
    found = explore(SETTINGS[setting], frozenset(cut), {breaks} if breaks else None)
    print(*found.story, f"{found.broken or 'nothing'} is broken; {found.worlds} worlds", sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
