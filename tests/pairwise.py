"""Cases in which every value of every parameter meets every value of every other one."""

import itertools
import random


def pairwise(parameters: dict[str, list], seed: int = 0) -> list[dict]:
    """A few dozen cases instead of the full product: greedy, and the same every time."""
    names, choose = list(parameters), random.Random(seed)
    missing = {
        (one, x, two, y)
        for one, two in itertools.combinations(range(len(names)), 2)
        for x in range(len(parameters[names[one]]))
        for y in range(len(parameters[names[two]]))
    }
    cases = []
    while missing:
        best: tuple = (-1,)
        one, x, two, y = min(missing)
        for _ in range(40):
            case = [choose.randrange(len(parameters[name])) for name in names]
            case[one], case[two] = x, y
            found = {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(names)), 2)} & missing
            best = max(best, (len(found), case, found), key=lambda entry: entry[0])
        missing -= best[2]
        cases.append({name: parameters[name][at] for name, at in zip(names, best[1], strict=True)})
    return cases
