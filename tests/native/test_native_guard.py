"""The ABI guard: an ONNX Runtime that the library does not know is refused before anything is handed to it.

The runtimes here are made of ctypes callbacks.
"""

import ctypes
from collections.abc import Callable

import pytest

from lit_binq_onnx.runtime.library import NativeLibrary
from native import require_native

STATUS = 0x1000
"""A made-up OrtStatus: the library only passes it on."""

GetApi = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
GetVersionString = ctypes.CFUNCTYPE(ctypes.c_void_p)
CreateStatus = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
GetErrorCode = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
Release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
CreateInfo = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


class ApiBase(ctypes.Structure):
    _fields_ = (("GetApi", GetApi), ("GetVersionString", GetVersionString))


class FakeRuntime:
    """A runtime of a given version, with CreateStatus and whatever else a test puts in its table."""

    def __init__(self, version: bytes | None, newest_api: int = 18) -> None:
        self.messages: list[str] = []
        self.asked: list[int] = []
        self.version = ctypes.create_string_buffer(version) if version is not None else None
        self.table = (ctypes.c_void_p * 300)()
        self.keep: list[object] = []
        self.newest_api = newest_api
        self.put(0, CreateStatus, self.create_status)
        self.base = ApiBase(GetApi(self.get_api), GetVersionString(self.get_version))

    def put(self, position: int, kind: Callable[..., object], function: Callable[..., object]) -> None:
        callback = kind(function)
        self.keep.append(callback)
        self.table[position] = ctypes.cast(callback, ctypes.c_void_p)  # type: ignore[arg-type]  # it takes callbacks too

    def create_status(self, code: int, message: bytes) -> int:
        self.messages.append(message.decode())
        return STATUS

    def get_api(self, version: int) -> int | None:
        self.asked.append(version)
        return ctypes.addressof(self.table) if version <= self.newest_api else None

    def get_version(self) -> int | None:
        return ctypes.addressof(self.version) if self.version is not None else None


def register(native: NativeLibrary, runtime: FakeRuntime) -> int | None:
    call = native.handle.RegisterCustomOps
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    return call(None, ctypes.addressof(runtime.base))


@pytest.fixture(scope="module")
def native() -> NativeLibrary:
    return require_native()


@pytest.mark.parametrize("version", [b"1.17.3", b"nightly", None])
def test_an_api_that_is_not_granted(native: NativeLibrary, version: bytes | None) -> None:
    """The version of the API decides, not the text; not one position of the table is called but CreateStatus."""
    runtime = FakeRuntime(version, newest_api=17)
    assert register(native, runtime) == STATUS
    assert runtime.asked == [18, 1]
    named = "(unknown)" if version is None else version.decode()
    assert runtime.messages == [
        f"lit_binq: ONNX Runtime {named} cannot run this library: it is too old, expected ONNX Runtime 1.18 or newer"
    ]


def test_another_table(native: NativeLibrary) -> None:
    """The right version with functions that answer otherwise than ours should."""
    runtime = FakeRuntime(b"1.31.1")
    text = ctypes.create_string_buffer(b"probe")
    runtime.put(1, GetErrorCode, lambda status: 99)
    runtime.put(2, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p), lambda status: ctypes.addressof(text))
    runtime.put(93, Release, lambda status: None)
    assert register(native, runtime) == STATUS
    assert runtime.messages[-1] == "lit_binq: ONNX Runtime 1.31.1 cannot run this library: it has another ABI (status)"

    runtime.put(1, GetErrorCode, lambda status: 2)
    runtime.put(57, CreateInfo, lambda info: STATUS)  # CreateTensorTypeAndShapeInfo fails
    assert register(native, runtime) == STATUS
    assert "another ABI (type and shape)" in runtime.messages[-1]
