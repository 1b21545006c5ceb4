"""Reads pickles without running them.

A pickle is a program: it names classes and functions, calls them and sets attributes of what it got. Python's ``pickle``
imports and calls whatever is named. Here a name stays a name. Plain data is rebuilt; what would be an object becomes a
:class:`Record` of what the pickle says about it; only the functions that the caller lists are called. Nothing is imported, no
attribute is set, and time and memory are in proportion to the size of the pickle.

Read is what Python 3 and torch write, protocols 2 to 5.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

_MOST_INT_BYTES = 1024


class UnreadablePickle(ValueError):
    """A pickle is damaged, or holds what is refused."""


class Name(str):
    """A class or function that a pickle names, as ``module.name``."""

    __slots__ = ()


class Record:
    """Stands in for an object: the ``name`` of its class, the ``args`` that made it, and the ``state`` it was given, if any."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args
        self.state: Any = None


class InertDict(dict[Any, Any]):
    """Stands in for an ``OrderedDict``; attributes that a pickle gives it are dropped."""

    __slots__ = ()


def _ordered_dict(items: Any = ()) -> InertDict:
    content = InertDict()
    for key, value in items:
        content[_as_key(key)] = value
    return content


def read_pickle(
    data: bytes,
    known: Mapping[str, Any],
    *,
    persistent: Callable[[Any], Any] | None = None,
    refuse_others: bool = False,
) -> Any:
    """The object in ``data``.

    ``known``: full name → a function, called with the arguments where the pickle calls that name, or the value that the name
    stands for. ``persistent`` is called with the ids of objects kept outside. Every other name becomes a :class:`Record` where
    it is called, or with ``refuse_others`` an error.

    Raises:
        UnreadablePickle: if the data is damaged, or has a name or an operation that is refused.

    >>> import collections, os
    >>> class Harmful:
    ...     def __reduce__(self):
    ...         return os.system, ("echo harm",)
    >>> found = read_pickle(pickle.dumps({"a": (1, 2.5, "x"), "b": Harmful()}), {})
    >>> found["a"], found["b"].name, found["b"].args
    ((1, 2.5, 'x'), 'posix.system', ('echo harm',))
    """
    machine = _Machine(data, {**_PLAIN, **known}, persistent, refuse_others)
    try:
        return machine.run()
    except UnreadablePickle:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise UnreadablePickle(f"is damaged at byte {machine.at} ({type(error).__name__}: {error})") from error


def _as_key(key: Any) -> Any:
    """A key of a dictionary. Hashing nested tuples would need a stack as deep as they are; huge numbers may all hash alike."""
    if type(key) is tuple and any(type(part) in (tuple, frozenset) for part in key):
        raise TypeError("a nested tuple is no key")
    if type(key) is int and key.bit_length() > 60:
        raise TypeError("a huge number is no key")
    return key


def _set(items: Any = ()) -> set[Any]:
    return set(map(_as_key, items))


def _frozen_set(items: Any = ()) -> frozenset[Any]:
    return frozenset(map(_as_key, items))


def _encoded(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


_PLAIN: Mapping[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    # Protocols 2 and 3 have no operations for these.
    **{f"{module}.set": _set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": _frozen_set for module in ("builtins", "__builtin__")},
    "__builtin__.bytes": lambda: b"",
    "_codecs.encode": _encoded,
}


class _Machine:
    """The stack machine of the pickle format (Lib/pickletools.py documents every operation)."""

    def __init__(
        self, data: bytes, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None, refuse_others: bool
    ) -> None:
        self.data, self.at = data, 0
        self._known, self._persistent, self._refuse_others = known, persistent, refuse_others
        self._names: dict[str, Any] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, memo = self.data, self._memo
        while True:
            code = data[self.at]
            self.at += 1
            if code == _MEMOIZE:
                memo[len(memo)] = self._stack[-1]
            elif code == _BINGET:
                self._stack.append(memo[data[self.at]])
                self.at += 1
            elif code == _LONG_BINGET:
                self._stack.append(memo[int.from_bytes(data[self.at : self.at + 4], "little")])
                self.at += 4
            elif code == _BININT1:
                self._stack.append(data[self.at])
                self.at += 1
            elif code == _STOP:
                return self._stack.pop()
            else:
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise UnreadablePickle(f"holds the operation {code:#04x} at byte {self.at - 1}, which data does not need")
                operation(self)

    def _take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise UnreadablePickle(f"ends within an object at byte {start}")
        return self.data[start : self.at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    # Values

    def _skip(self, count: int) -> None:
        self._take(count)

    def _signed(self, count: int) -> None:
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _long(self, size: int) -> None:
        count = self._number(size)
        if count > _MOST_INT_BYTES:
            raise UnreadablePickle(f"holds a number of {count} bytes")
        self._signed(count)

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _text(self, size: int) -> None:
        self._push(str(self._take(self._number(size)), "utf-8", "surrogatepass"))

    def _bytes(self, size: int) -> None:
        self._push(self._take(self._number(size)))

    def _put(self, size: int) -> None:
        self._memo[self._number(size)] = self._stack[-1]

    # Containers

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("too few items")
        del self._stack[-count:]
        self._push(items)

    def _extend(self) -> None:
        items = self._pop_marked()
        self._target(list).extend(items)

    def _append(self) -> None:
        item = self._stack.pop()
        self._target(list).append(item)

    def _add_items(self) -> None:
        items = self._pop_marked()
        self._target(set).update(_set(items))

    def _set_items(self) -> None:
        items = self._pop_marked()
        self._set_pairs(items)

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_pairs([key, value])

    def _set_pairs(self, items: list[Any]) -> None:
        target = self._target(dict, InertDict, Record)
        if not isinstance(target, Record):  # a Record of a mapping: its items are dropped
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_as_key(key)] = value

    def _target(self, *kinds: type) -> Any:
        target = self._stack[-1]
        if type(target) is Record and list in kinds:
            return []  # a Record of a list: its items are dropped
        if type(target) not in kinds:
            raise TypeError(f"{type(target).__name__} takes no items")
        return target

    # Objects

    def _global(self) -> None:
        end = self.data.index(b"\n", self.at)
        module = str(self.data[self.at : end], "utf-8")
        start, end = end + 1, self.data.index(b"\n", end + 1)
        self.at = end + 1
        self._push_name(f"{module}.{str(self.data[start:end], 'utf-8')}")

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name is not text")
        self._push_name(f"{module}.{name}")

    def _push_name(self, name: str) -> None:
        if name not in self._names:
            value = self._known.get(name)
            if value is None and self._refuse_others:
                raise UnreadablePickle(f"names {name}, which is not data")
            self._names[name] = Name(name) if value is None or callable(value) else value
        self._push(self._names[name])

    def _call(self) -> None:
        args, name = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple or type(name) not in (Name, Record):
            raise TypeError("a call of what is no name")
        if type(name) is Record:
            self._push(Record(name.name, args))
        else:
            make = self._known.get(name)
            self._push(make(*args) if make is not None else Record(name, args))

    def _call_with_names(self) -> None:
        if self._stack.pop():
            raise UnreadablePickle("calls a name with keywords")
        self._call()

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) is not InertDict:
            raise UnreadablePickle(f"sets attributes of {'a class' if type(target) is Name else type(target).__name__}")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise UnreadablePickle("refers to objects outside of it")
        self._push(self._persistent(self._stack.pop()))

    def _pop(self) -> None:
        self._stack.pop()


_MEMOIZE, _BINGET, _LONG_BINGET, _BININT1, _STOP = (
    operation[0] for operation in (pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.BININT1, pickle.STOP)
)
_OPERATIONS: Mapping[int, Callable[[_Machine], object]] = {
    operation[0]: function
    for operation, function in {
        pickle.PROTO: lambda machine: machine._skip(1),
        pickle.FRAME: lambda machine: machine._skip(8),
        pickle.MARK: _Machine._mark,
        pickle.POP: _Machine._pop,
        pickle.POP_MARK: _Machine._pop_marked,
        pickle.BINPUT: lambda machine: machine._put(1),
        pickle.LONG_BINPUT: lambda machine: machine._put(4),
        pickle.NONE: lambda machine: machine._push(None),
        pickle.NEWTRUE: lambda machine: machine._push(True),
        pickle.NEWFALSE: lambda machine: machine._push(False),
        pickle.BININT: lambda machine: machine._signed(4),
        pickle.BININT2: lambda machine: machine._push(machine._number(2)),
        pickle.LONG1: lambda machine: machine._long(1),
        pickle.LONG4: lambda machine: machine._long(4),
        pickle.BINFLOAT: _Machine._float,
        pickle.SHORT_BINUNICODE: lambda machine: machine._text(1),
        pickle.BINUNICODE: lambda machine: machine._text(4),
        pickle.BINUNICODE8: lambda machine: machine._text(8),
        pickle.SHORT_BINBYTES: lambda machine: machine._bytes(1),
        pickle.BINBYTES: lambda machine: machine._bytes(4),
        pickle.BINBYTES8: lambda machine: machine._bytes(8),
        pickle.BYTEARRAY8: lambda machine: machine._push(bytearray(machine._take(machine._number(8)))),
        pickle.EMPTY_TUPLE: lambda machine: machine._push(()),
        pickle.TUPLE1: lambda machine: machine._tuple(1),
        pickle.TUPLE2: lambda machine: machine._tuple(2),
        pickle.TUPLE3: lambda machine: machine._tuple(3),
        pickle.TUPLE: lambda machine: machine._push(tuple(machine._pop_marked())),
        pickle.EMPTY_LIST: lambda machine: machine._push([]),
        pickle.APPEND: _Machine._append,
        pickle.APPENDS: _Machine._extend,
        pickle.EMPTY_DICT: lambda machine: machine._push({}),
        pickle.SETITEM: _Machine._set_item,
        pickle.SETITEMS: _Machine._set_items,
        pickle.EMPTY_SET: lambda machine: machine._push(set()),
        pickle.ADDITEMS: _Machine._add_items,
        pickle.FROZENSET: lambda machine: machine._push(_frozen_set(machine._pop_marked())),
        pickle.GLOBAL: _Machine._global,
        pickle.STACK_GLOBAL: _Machine._stack_global,
        pickle.REDUCE: _Machine._call,
        pickle.NEWOBJ: _Machine._call,
        pickle.NEWOBJ_EX: _Machine._call_with_names,
        pickle.BUILD: _Machine._build,
        pickle.BINPERSID: _Machine._persistent_id,
    }.items()
}
