"""One number changed in an ONNX file without the onnx package: the accuracy of ONNX Runtime's MatMulNBits.

A protobuf message is a row of fields: a key (field number * 8 + wire type) and a value, which is a varint (wire type
0), 8 bytes (1), a length and as many bytes (2), or 4 bytes (5). Varints have 7 bits a byte, the low ones first, and
the high bit set in all bytes but the last. Source: protobuf's encoding guide, and field numbers from onnx.proto.
"""

from collections.abc import Iterator

_GRAPH, _FUNCTIONS = 7, 25  # of ModelProto
_GRAPH_NODE, _FUNCTION_NODE = 1, 7
_OP_TYPE, _ATTRIBUTE = 4, 5  # of NodeProto
_NAME, _INTEGER = 1, 3  # of AttributeProto

_FIXED = {1: 8, 5: 4}
"""Bytes of a value, by wire type."""


def _varint(data: bytearray, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytearray, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte of its value, byte behind it) of a message; of a string or message without its length.

    Raises:
        ValueError: a wire type that protobuf no longer has.
    """
    while begin < end:
        key, begin = _varint(data, begin)
        kind = key & 7
        if kind == 0:
            stop = _varint(data, begin)[1]
        elif kind == 2:
            length, begin = _varint(data, begin)
            stop = begin + length
        elif kind in _FIXED:
            stop = begin + _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, begin, stop
        begin = stop


def with_float_activations(model: bytes) -> bytes:
    """A model whose MatMulNBits nodes, in the graph and in function bodies, read float32 activations.

    That is accuracy_level 1. Every level is one byte, so no length in the file changes.

    Args:
        model: a serialized ModelProto.

    Raises:
        ValueError: no ModelProto.
        IndexError: it is cut off.
    """
    data = bytearray(model)
    for field, begin, end in _fields(data, 0, len(data)):
        if field not in (_GRAPH, _FUNCTIONS):
            continue
        wanted = _GRAPH_NODE if field == _GRAPH else _FUNCTION_NODE
        for inner, start, stop in _fields(data, begin, end):
            if inner == wanted:
                _change_node(data, start, stop)
    return bytes(data)


def _change_node(data: bytearray, begin: int, end: int) -> None:
    fields = list(_fields(data, begin, end))
    if not any(field == _OP_TYPE and data[a:b] == b"MatMulNBits" for field, a, b in fields):
        return
    for field, a, b in fields:
        if field != _ATTRIBUTE:
            continue
        parts = list(_fields(data, a, b))
        if any(part == _NAME and data[i:j] == b"accuracy_level" for part, i, j in parts):
            for part, i, _ in parts:
                if part == _INTEGER:
                    data[i] = 1
