"""How the time of a regular expression may grow with the text, from its structure.

A backtracking matcher tries every way in which a text can be read. If there are two ways around a loop for the same text, n
rounds have 2^n readings: *exponential*. If a loop can hand over to a later one anywhere within the same text, there are n
readings, and n^2 steps: *polynomial*. Both are properties of the pattern's automaton (Weideman et al., "Analyzing matching time
behavior of backtracking regular expression matchers by using ambiguity of NFA", CIAA 2016), which is built here from what
``re._parser`` gives.

Possessive repeats and atomic groups never come back to what they have read, so their insides are judged on their own. Not
judged: the scan of ``search`` for a place to begin (``benchmarks/regex_growth.py`` measures that), and the length of what a
back reference repeats.
"""

import ast
import importlib
import pkgutil
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from re import _constants as op
from re import _parser as parser

import nft_megatron

NEEDS_MORE = {"nft_megatron.rollout.fleet.worker_extension", "nft_megatron.model.lm_head_kernels"}  # vLLM, Triton
_FUNCTIONS = {
    f"re.{name}" for name in ("compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")
}
_MANY = 50  # a repeat that may go as often counts as endless
_SAMPLES = [*map(chr, range(128)), *"é²٣\u00a0\u2009−√中′"]


# ------------------------------------------------------------------------------------------------ the patterns of the package


def compiled_patterns() -> dict[str, re.Pattern[str]]:
    """Every pattern that a module of the package holds, by module and name."""
    found: dict[str, re.Pattern[str]] = {}
    for info in pkgutil.walk_packages(nft_megatron.__path__, "nft_megatron."):
        if info.name not in NEEDS_MORE and not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                for number, pattern in enumerate(_patterns_in(value)):
                    if pattern not in found.values():
                        found[f"{info.name.removeprefix('nft_megatron.')}.{name}[{number}]"] = pattern
    return found


def _patterns_in(value: object) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | list) and not isinstance(value, str):
        for item in value:
            yield from _patterns_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _patterns_in(item)


@dataclass(frozen=True)
class Call:
    """A call of a function of ``re``. ``pattern`` is None if it is not literal."""

    where: str
    pattern: str | None
    at_import: bool


def calls() -> list[Call]:
    """Every call of ``re`` in the package's source."""
    root = Path(nft_megatron.__file__).parent
    return [call for path in sorted(root.rglob("*.py")) for call in _calls_in(path, path.relative_to(root).as_posix())]


def _calls_in(path: Path, name: str) -> Iterator[Call]:
    tree = ast.parse(path.read_text())
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in _FUNCTIONS:
            text = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            yield Call(f"{name}:{node.lineno}", text if isinstance(text, str) else None, id(node) not in inside)


# ------------------------------------------------------------------------------------------------------------- the automaton

Chars = int  # a set of samples, one bit each; the bit after the last means the end of the text


@dataclass
class Automaton:
    """States 0 (start) and 1 (end of the pattern). Steps that read nothing may need the next character to be in a set."""

    samples: list[str]
    reads: dict[int, list[tuple[Chars, int]]] = field(default_factory=lambda: defaultdict(list))
    skips: dict[int, list[tuple[Chars, int]]] = field(default_factory=lambda: defaultdict(list))
    num_states: int = 2
    atomic: list[range] = field(default_factory=list)
    """States within a possessive repeat or an atomic group: a matcher that has left them never comes back."""

    @property
    def everything(self) -> Chars:
        return (1 << (len(self.samples) + 1)) - 1

    def state(self) -> int:
        self.num_states += 1
        return self.num_states - 1


@dataclass
class Growth:
    """``kind``: linear, polynomial or exponential. ``strings``: (before, repeated) that make a matcher work."""

    kind: str
    where: str = ""
    strings: list[tuple[str, str]] = field(default_factory=list)


def growth(pattern: str, flags: int = 0) -> Growth:
    """The worst of the pattern and of the parts that are judged on their own."""
    tree = parser.parse(pattern, flags)
    results = []
    parts = deque([(pattern, list(tree))])
    while parts:
        name, items = parts.popleft()
        builder = _Builder(_samples_of(items), tree.state.flags)
        builder.sequence(items, 0, 1)
        parts.extend((f"a part of {pattern}", part) for part in builder.apart)
        results.append(_judge(builder.automaton, name))
    order = ("linear", "polynomial", "exponential")
    worst = max(results, key=lambda result: order.index(result.kind))
    return Growth(worst.kind, worst.where, [string for result in results for string in result.strings])


def _samples_of(items: Iterable[tuple[object, object]]) -> list[str]:
    """The characters that the pattern may tell apart: its literals and the ends of its ranges, with their neighbours."""
    found = set(_SAMPLES)

    def walk(node: object) -> None:
        if isinstance(node, parser.SubPattern):
            node = list(node)
        if isinstance(node, list | tuple):
            if len(node) == 2 and node[0] in (op.LITERAL, op.NOT_LITERAL):
                found.add(chr(node[1]))
            elif len(node) == 2 and node[0] is op.RANGE:
                found.update(chr(code) for end in node[1] for code in (max(end - 1, 0), end, min(end + 1, 0x10FFFF)))
            else:
                for part in node:
                    walk(part)

    walk(list(items))
    return sorted(found)


class _Builder:
    def __init__(self, samples: list[str], flags: int) -> None:
        self.automaton, self.flags = Automaton(samples), flags
        self.apart: list[list[tuple[object, object]]] = []

    def sequence(self, items: Iterable[tuple[object, object]], start: int, end: int) -> None:
        at = start
        for item in items:
            following = self.automaton.state()
            self.item(item, at, following)
            at = following
        self.skip(at, end)

    def skip(self, start: int, end: int, guard: Chars | None = None) -> None:
        self.automaton.skips[start].append((self.automaton.everything if guard is None else guard, end))

    def item(self, item: tuple[object, object], start: int, end: int) -> None:
        kind, value = item
        chars = self.chars(item)
        if chars is not None:
            self.automaton.reads[start].append((chars, end))
        elif kind is op.SUBPATTERN:
            self.sequence(value[3], start, end)
        elif kind is op.BRANCH:
            for branch in value[1]:
                self.sequence(branch, start, end)
        elif kind is op.AT:
            self.skip(start, end, self.end_guard(value))
        elif kind is op.ASSERT or kind is op.ASSERT_NOT:
            self.look(kind, value, start, end)
        elif kind is op.MAX_REPEAT or kind is op.MIN_REPEAT:
            self.repeat(*value, start, end)
        elif kind is op.POSSESSIVE_REPEAT or kind is op.ATOMIC_GROUP:
            first = self.automaton.num_states
            if kind is op.ATOMIC_GROUP:
                self.apart.append(list(value))
                self.sequence(value, start, end)
            else:
                self.apart.append(list(value[2]))
                self.repeat(*value, start, end, possessive=True)
            self.automaton.atomic.append(range(first, self.automaton.num_states))
        elif kind is op.GROUPREF:  # what a group has read: one character stands for it
            self.automaton.reads[start].append((self.bits(lambda _: True), end))
        else:
            raise NotImplementedError(str(kind))

    def end_guard(self, kind: object) -> Chars | None:
        end_of_text = 1 << len(self.automaton.samples)
        if kind is op.AT_END_STRING:
            return end_of_text
        return end_of_text | self.bits("\n".__eq__) if kind is op.AT_END else None

    def look(self, kind: object, value: tuple[int, Iterable[tuple[object, object]]], start: int, end: int) -> None:
        direction, inside = value
        items = list(inside)
        self.apart.append(items)
        single = self.chars(items[0]) if len(items) == 1 and direction > 0 else None
        if single is None:
            self.skip(start, end)
        else:
            self.skip(start, end, single if kind is op.ASSERT else self.automaton.everything & ~single)

    def repeat(
        self, least: int, most: int, body: Iterable[tuple[object, object]], start: int, end: int, *, possessive: bool = False
    ) -> None:
        items = list(body)
        single = self.chars(items[0]) if len(items) == 1 else None
        leave = self.automaton.everything & ~single if possessive and single is not None else None
        at = start
        for _ in range(min(least, 3)):
            following = self.automaton.state()
            self.sequence(items, at, following)
            at = following
        if most >= _MANY:
            loop = self.automaton.state()
            self.skip(at, loop)
            back = self.automaton.state()
            self.sequence(items, loop, back)
            self.skip(back, loop)
            self.skip(loop, end, leave)
            return
        for _ in range(min(most - least, 3)):
            following = self.automaton.state()
            self.skip(at, end, leave)
            self.sequence(items, at, following)
            at = following
        self.skip(at, end)

    def chars(self, item: tuple[object, object]) -> Chars | None:
        """The characters that a one-character item reads; None for other items."""
        kind, value = item
        if kind is op.SUBPATTERN and len(value[3]) == 1:
            return self.chars(value[3][0])
        if kind is op.ANY:
            return self.bits(lambda char: bool(self.flags & re.DOTALL) or char != "\n")
        if kind is op.LITERAL or kind is op.NOT_LITERAL:
            found = self.bits(lambda char: self.same(char, chr(value)))
            return found if kind is op.LITERAL else self.bits(lambda _: True) & ~found
        if kind is op.IN:
            found = 0
            for each, detail in value:
                if each is op.LITERAL:
                    found |= self.bits(lambda char, detail=detail: self.same(char, chr(detail)))
                elif each is op.RANGE:
                    found |= self.bits(lambda char, detail=detail: self.in_range(char, *detail))
                elif each is op.CATEGORY:
                    found |= self.bits(re.compile(_CATEGORIES[detail], self.flags & re.ASCII).match)
            return self.bits(lambda _: True) & ~found if value[0][0] is op.NEGATE else found
        return None

    def bits(self, wanted) -> Chars:
        return sum(1 << number for number, char in enumerate(self.automaton.samples) if wanted(char))

    def same(self, char: str, literal: str) -> bool:
        return char == literal or bool(self.flags & re.IGNORECASE and char.lower() == literal.lower())

    def in_range(self, char: str, first: int, last: int) -> bool:
        forms = (char, char.lower(), char.upper()) if self.flags & re.IGNORECASE else (char,)
        return any(len(form) == 1 and first <= ord(form) <= last for form in forms)


_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d",
    op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_SPACE: r"\s",
    op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w",
    op.CATEGORY_NOT_WORD: r"\W",
}

# ------------------------------------------------------------------------------------------------------------- the judgement

Steps = dict[int, list[tuple[Chars, int]]]


def _steps(automaton: Automaton) -> Steps:
    """From each state in which a character has been read (and the start) to the next such, once for each way to get there."""
    targets = {0} | {end for reads in automaton.reads.values() for _, end in reads}
    result: Steps = {}
    for state in targets:
        result[state] = []
        stack: list[tuple[int, Chars, frozenset[tuple[int, int]]]] = [(state, automaton.everything, frozenset())]
        while stack:
            at, guard, seen = stack.pop()
            result[state] += [(chars & guard, end) for chars, end in automaton.reads.get(at, ()) if chars & guard]
            for allowed, end in automaton.skips.get(at, ()):
                if (at, end) not in seen and allowed & guard:
                    stack.append((end, guard & allowed, seen | {(at, end)}))
    return result


def _components(edges: dict[object, set[object]]) -> list[set[object]]:
    """Strongly connected components (Tarjan, without recursion)."""
    index: dict[object, int] = {}
    low: dict[object, int] = {}
    on_stack: set[object] = set()
    stack: list[object] = []
    result = []
    for root in edges:
        if root in index:
            continue
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, following = work[-1]
            for target in following:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    on_stack.add(target)
                    work.append((target, iter(edges.get(target, ()))))
                    break
                if target in on_stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = set()
                    while not component or node not in component:
                        component.add(stack.pop())
                    on_stack -= component
                    result.append(component)
    return result


def _judge(automaton: Automaton, name: str) -> Growth:
    steps = _steps(automaton)
    edges: dict[object, set[object]] = {state: {end for _, end in reads} for state, reads in steps.items()}
    loops = [part for part in _components(edges) if len(part) > 1 or any(state in edges[state] for state in part)]
    strings = [
        (_word(automaton, steps, 0, state) or "", _around(automaton, steps, state))
        for loop in loops
        for state in sorted(loop)[:2]
    ]
    strings = [(before, repeated) for before, repeated in strings if repeated]
    free = [loop for loop in loops if not any(loop <= set(states) for states in automaton.atomic)]
    for loop in free:
        if _has_two_ways_around(steps, loop):
            return Growth("exponential", name, strings)
    for first in free:
        for second in loops:
            if first is not second and _hands_over(steps, first, second):
                return Growth("polynomial", name, strings)
    return Growth("linear", name, strings)


def _has_two_ways_around(steps: Steps, loop: set[object]) -> bool:
    """Whether some text leads from a state of the loop back to it in two ways."""
    pairs: dict[object, set[object]] = defaultdict(set)
    doubled: set[tuple[object, object]] = set()
    for a in loop:
        for b in loop:
            for i, (chars, to_a) in enumerate(steps[a]):
                for j, (others, to_b) in enumerate(steps[b]):
                    if chars & others and to_a in loop and to_b in loop:
                        pairs[a, b].add((to_a, to_b))
                        if a == b and to_a == to_b and i != j:
                            doubled.add(((a, b), (to_a, to_b)))
    for component in _components(dict(pairs)):
        diagonal = {pair for pair in component if pair[0] == pair[1]}
        if diagonal and len(component) > len(diagonal):
            return True
        if any(start in component and end in component and (len(component) > 1 or start == end) for start, end in doubled):
            return True
    return False


def _hands_over(steps: Steps, first: set[object], second: set[object]) -> bool:
    """Whether some text leads around the first loop, around the second, and from a state of the first to one of the second."""
    for p in first:
        for q in second:
            start, goal = (p, p, q), (p, q, q)
            seen, queue = {start}, deque([start])
            while queue:
                a, b, c = queue.popleft()
                for chars_a, to_a in steps[a]:
                    if to_a not in first:
                        continue
                    for chars_c, to_c in steps[c]:
                        if to_c not in second or not chars_a & chars_c:
                            continue
                        for chars_b, to_b in steps[b]:
                            following = (to_a, to_b, to_c)
                            if chars_a & chars_b & chars_c and following not in seen:
                                if following == goal:
                                    return True
                                seen.add(following)
                                queue.append(following)
    return False


def _word(automaton: Automaton, steps: Steps, start: int, goal: int, *, least: int = 0) -> str | None:
    """The shortest text (of at least ``least`` characters) from one state to another."""
    queue = deque([(start, "")])
    seen = set() if least else {start}
    while queue:
        state, text = queue.popleft()
        if state == goal and len(text) >= least:
            return text
        for chars, end in steps[state]:
            readable = [char for number, char in enumerate(automaton.samples) if chars >> number & 1]
            if readable and end not in seen:
                seen.add(end)
                queue.append((end, text + next((char for char in readable if char.isalnum()), readable[-1])))
    return None


def _around(automaton: Automaton, steps: Steps, state: int) -> str:
    return _word(automaton, steps, state, state, least=1) or ""
