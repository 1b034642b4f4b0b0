"""eval.clusters for many responses: the same sets, without recursion and with a budget.

Finding a largest clique takes exponential time on some graphs. The search stops when its budget is
spent, and says how large a clique could still be. Sets of vertices are numbers: bit v says whether
vertex v is in the set.
"""

import functools

import numpy as np

BUDGET = 200_000  # steps of the search for one question, three seconds at 150 responses


def bounded_clusters(similar, budget: int = BUDGET) -> tuple[list, int]:
    """The sets of mutually similar responses, and an upper bound of the size of the largest.

    similar: (n, n) bool. Exact, and the bound is that size, unless the budget is spent. From then
    on each set is the best that was found.
    """
    rows = np.asarray(similar & similar.T)  # (n, n)
    neighbours = [sum(1 << j for j in np.flatnonzero(row).tolist()) for row in rows]
    return search(tuple(neighbours), budget)


@functools.lru_cache(1)  # eval.py asks for the sets of a question, MoreMetrics for their bound
def search(neighbours: tuple[int, ...], budget: int) -> tuple[list, int]:
    """`bounded_clusters` of a graph."""
    found, bounds, rest = [], [], (1 << len(neighbours)) - 1
    while rest:
        members, bound, budget = largest_clique(rest, neighbours, budget)
        found.append(sorted(members))
        bounds.append(bound)
        rest -= sum(1 << vertex for vertex in members)
    found.sort(key=lambda members: (-len(members), members))
    return found, max(bounds[0], len(found[0]))


def largest_clique(candidates: int, neighbours: tuple[int, ...], budget: int) -> tuple:
    """As eval.largest_clique, and in its order: (members, bound of their number, budget left)."""
    best, stack = [], [([], candidates, colour_vertices(candidates, neighbours))]
    while stack:
        clique, candidates, coloured = stack.pop()
        if coloured and len(clique) + coloured[-1][0] > len(best):
            _, vertex = coloured.pop()
            stack.append((clique, candidates & ~(1 << vertex), coloured))
            clique, candidates = [*clique, vertex], candidates & neighbours[vertex] & ~(1 << vertex)
            stack.append((clique, candidates, colour_vertices(candidates, neighbours)))
            best = max(best, clique, key=len)
            budget -= 1
        elif budget < 0:  # a branch has ended, so `best` cannot be extended
            break
    bounds = [len(clique) + coloured[-1][0] for clique, _, coloured in stack if coloured]
    return best, max([len(best), *bounds]), budget


def colour_vertices(candidates: int, neighbours: tuple[int, ...]) -> list[tuple[int, int]]:
    """(colour, vertex) of each candidate; no two neighbours share one of the colours 1, 2, ..."""
    coloured, colour = [], 0
    while candidates:
        colour, free = colour + 1, candidates
        while free:
            vertex = (free & -free).bit_length() - 1  # the lowest bit
            coloured.append((colour, vertex))
            candidates &= ~(1 << vertex)
            free &= ~(neighbours[vertex] | 1 << vertex)
    return coloured
