"""Pickles from elsewhere, read so that they can neither run code nor take the machine down.

A pickle is a program. `Unpickler` leaves a subclass to say what may be called (`find_class`); what
remains dangerous is what costs much more to do than to write:

    a length, or the index of a memo, that is only claimed         checked before it is believed
    a tuple of twice one tuple, of twice one tuple, and so on      never hashed, see `_check_keys`
    millions of opcodes, or of tuples inside tuples                counted first
"""

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

MAX_OPCODES = 2_000_000  # CIFAR-100's training set takes 0.4 million, a network a few thousand
MAX_TUPLES = 50_000  # of a network four per tensor. Millions, nested, overflow Python's stack

_KEYS = (str, bytes, int, float, type(None))


def check(stream: io.BytesIO) -> None:
    """Raises ValueError unless the next pickle in `stream` is complete and of bounded cost.

    Leaves the stream where it was. Whatever else pickletools raises on damage is also an error, and
    so is what Python only warns of, such as a text with an escape that there is not.
    """
    start, limit, tuples = stream.tell(), stream.getbuffer().nbytes, 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            # The unpickler may allocate its memo up to the largest index, which one byte makes 4e9.
            if opcode.name in ("PUT", "LONG_BINPUT") and not 0 <= (argument or 0) <= limit:
                raise ValueError(f"{argument} as an index in a pickle of {limit} bytes")
            tuples += opcode.name.startswith("TUPLE")
            if number > MAX_OPCODES or tuples > MAX_TUPLES:
                raise ValueError(
                    f"more than {MAX_OPCODES} steps or {MAX_TUPLES} tuples in a pickle"
                )
            if opcode.name.startswith("EXT"):
                raise ValueError("it uses extension codes, which have a cache beside find_class")
    stream.seek(start)


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises TypeError for a key that is more than a number or a text.

    A tuple that holds one tuple twice, which holds another twice, and so on forty times, is a
    hundred bytes long, and its hash takes a day.
    """
    for key in keys:
        if not isinstance(key, _KEYS):
            raise TypeError(f"a {type(key).__name__} as a key, where texts and numbers are read")


class StateDict(dict):
    """Stands in for OrderedDict. Drops the attributes that pickles set (PyTorch's `_metadata`)."""

    def __init__(self, items: Iterable[tuple[Any, Any]] = ()):
        items = [(key, value) for key, value in items]
        _check_keys(key for key, _ in items)
        super().__init__(items)

    def __setstate__(self, state):
        pass


_PythonUnpickler: Any = pickle._Unpickler  # whose methods type checkers do not know

# Steps that hash something, and where it lies on the stack, which begins at the last mark.
_HASHED = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.DICT: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}


def _guarded(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def step(unpickler: Any) -> None:
        _check_keys(unpickler.stack[keys])
        load(unpickler)

    return step


class Unpickler(_PythonUnpickler):
    """Builds containers, numbers and text, and calls what a subclass's `find_class` returns.

    This is the unpickler in Python, whose steps can be replaced; the one in C hashes any key.
    """

    dispatch: ClassVar[dict[int, Any]] = _PythonUnpickler.dispatch | {
        code[0]: _guarded(_PythonUnpickler.dispatch[code[0]], keys)
        for code, keys in _HASHED.items()
    }

    def __init__(self, stream: io.BytesIO, *, encoding: str):
        check(stream)
        super().__init__(stream, encoding=encoding)
