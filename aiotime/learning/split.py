"""Halves: a backward in two parts, so that the stage below need not wait for this stage's weight gradients.

    roots ─▶ J₁ ─▶ J₂ ─▶ J₃ ─▶ input         first:   along the chain, weights left out; what reaches each J is noted
              │     │     │
              w₁    w₂    w₃                  second:  from each J one step to its own weights, the chain untouched

(Input gradient first, weight gradient when there is time: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024.)

A node J of the graph through which the input is reached, and from which some path to a weight leaves that does not
lead to the input, is a join. A weight below one join alone waits for the second part: its gradient is what that join
makes of what reached it. A weight below several joins (one module called twice, tied weights) is differentiated in the
first part: from one of its joins a walk would come past the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

Tensors = list[torch.Tensor]
Maybe = list[torch.Tensor | None]


class Halves:
    """The two parts of one backward; the gradients are those of one ``torch.autograd.grad``.

    Args:
        roots: what is differentiated; seeds: by which outer gradient (None: 1, for a 0-dim tensor).
        entry: leaves whose gradients are wanted first.
        weights: leaves whose gradients can wait.

    The graph must have no hooks on tensors that change a gradient: those of a join would be applied twice.
    It is kept until `second`.
    """

    def __init__(
        self, roots: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor | None], entry: Tensors, weights: Tensors
    ) -> None:
        self._roots, self._seeds = list(roots), list(seeds)
        self._entry, self._weights = entry, weights
        self._grads: Maybe = [None] * len(weights)
        self._owed: list[tuple[Any, list[int]]] = []  # join, the positions of its weights
        self._apart: list[int] = []  # positions of weights that no join leads to
        self._met: dict[Any, tuple[torch.Tensor | None, ...]] = {}  # what reached each join

    def first(self) -> Maybe:
        """Gradients for ``entry`` (None: the roots do not depend on it)."""
        if not self._roots:
            return [None] * len(self._entry)
        at_once = self._explore()
        if not self._entry and not at_once:
            return []
        hooks = [join.register_prehook(self._note(join)) for join, _ in self._owed]
        try:
            grads = torch.autograd.grad(
                self._roots, [*self._entry, *(self._weights[at] for at in at_once)], self._seeds,
                allow_unused=True, retain_graph=True,
            )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
        for at, grad in zip(at_once, grads[len(self._entry) :], strict=True):
            self._grads[at] = grad
        return list(grads[: len(self._entry)])

    def second(self) -> Maybe:
        """Gradients for ``weights``; to be called once, after `first`."""
        for join, positions in self._owed:
            met = {at: grad for at, grad in enumerate(self._met.pop(join, ())) if grad is not None}
            self._take(positions, [GradientEdge(join, at) for at in met], list(met.values()))
        if self._apart:
            self._take(self._apart, self._roots, self._seeds)
        self._roots, self._seeds, self._owed = [], [], []
        return self._grads

    def _take(self, positions: list[int], roots: Sequence[Any], seeds: Sequence[torch.Tensor | None]) -> None:
        if not roots:
            return
        found = torch.autograd.grad(roots, [self._weights[at] for at in positions], seeds, allow_unused=True)
        for at, grad in zip(positions, found, strict=True):
            self._grads[at] = grad

    def _note(self, join: Any) -> Callable[[tuple[torch.Tensor | None, ...]], None]:
        def note(grads: tuple[torch.Tensor | None, ...]) -> None:
            self._met[join] = grads

        return note

    def _explore(self) -> list[int]:
        """Sort the weights: below one join (`_owed`), below none (`_apart`), or (returned) to be taken at once."""
        entries = {id(leaf) for leaf in self._entry}
        places = {id(leaf): at for at, leaf in enumerate(self._weights)}
        tops: list[Any] = [get_gradient_edge(root).node for root in self._roots]
        carries: dict[Any, bool] = {}  # node: does it lead to an entry? (holding the nodes keeps their identity)
        ends: dict[Any, int] = {}  # leaf node: position of its weight
        joins: list[tuple[Any, list[Any]]] = []  # node, the children that lead to no entry
        stack: list[tuple[Any, list[Any] | None]] = [(top, None) for top in tops]
        while stack:  # children before parents
            node, below = stack.pop()
            if below is None:
                if node in carries:
                    continue
                carries[node] = False
                below = [child for child, _ in node.next_functions if child is not None]
                stack.append((node, below))
                stack += [(child, None) for child in below if child not in carries]
                if not below and (variable := getattr(node, "variable", None)) is not None:
                    carries[node] = id(variable) in entries
                    if (at := places.get(id(variable))) is not None:
                        ends[node] = at
            elif any(carries[child] for child in below):
                carries[node] = True
                if aside := [child for child in below if not carries[child]]:
                    joins.append((node, aside))
        owner: dict[int, Any] = {}  # weight: its join; `self` for roots that lead to no entry
        shared: set[int] = set()
        starts = [*joins, (self, [top for top in tops if not carries[top]])]
        for join, aside in starts:
            for at in _leaves(aside, ends):
                if owner.setdefault(at, join) is not join:
                    shared.add(at)
        for join, _ in starts:
            own = [at for at, whose in owner.items() if whose is join and at not in shared]
            if join is self:
                self._apart = own
            elif own:
                self._owed.append((join, own))
        return sorted(shared)


def _leaves(nodes: Sequence[Any], ends: dict[Any, int]) -> list[int]:
    """Positions of the weights below ``nodes``."""
    found, seen, stack = [], set(), list(nodes)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.append(ends[node])
        stack += [child for child, _ in node.next_functions if child is not None]
    return found
