"""Library: a compiled model in a shared library, called through AOTInductor's C interface with the GIL released.

    tensors ── handles ──▶ AOTInductorModelContainerRun ── handles ──▶ tensors
                           (ctypes lets Python's lock go for its whole duration)

PyTorch's own bindings (``aoti_load_package``, ``AOTIModelPackageLoader.boxed_run``) hold the lock while the model runs,
so that two stages would run one after the other. The C interface is the one those bindings are made of
(``torch/csrc/inductor/aoti_runtime/interface.h``); it needs no extension to be built.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_Handle = ctypes.c_void_p
_Size = ctypes.c_size_t


class LibraryError(Exception):
    """The library cannot be loaded, or its code failed; the text is for people."""


class _Entry(ctypes.Structure):
    """A constant's name and tensor."""

    _fields_ = (("name", ctypes.c_char_p), ("handle", _Handle))


_PREFIX = "AOTInductorModelContainer"
_SIGNATURES: dict[str, list[Any]] = {
    "CreateWithDevice": [ctypes.POINTER(_Handle), _Size, ctypes.c_char_p, ctypes.c_char_p],
    "Delete": [_Handle],
    "Run": [_Handle, _Handle, _Size, _Handle, _Size, _Handle, _Handle],
    "GetNumInputs": [_Handle, ctypes.POINTER(_Size)],
    "GetNumOutputs": [_Handle, ctypes.POINTER(_Size)],
    "GetNumConstants": [_Handle, ctypes.POINTER(_Size)],
    "GetConstantName": [_Handle, _Size, ctypes.POINTER(ctypes.c_char_p)],
    "GetConstantOriginalFQN": [_Handle, _Size, ctypes.POINTER(ctypes.c_char_p)],
    "ExtractConstantsMapEntries": [
        _Handle,
        ctypes.POINTER(ctypes.POINTER(_Entry)),
        ctypes.POINTER(_Size),
        ctypes.c_bool,
    ],
    "UpdateUserManagedConstantBufferPairs": [_Handle, ctypes.POINTER(_Entry), _Size, ctypes.c_bool, ctypes.c_bool],
}


class Library:
    """One compiled model.

    Args:
        path: of the shared library.
        device: where it runs.
        models: how many calls may run at the same time.

    Attributes:
        inputs, outputs: how many tensors go in and come out.
        constants: full name -> its name in the code.
        held: the tensors that were bound.

    Raises:
        LibraryError: it cannot be loaded.
    """

    def __init__(self, path: Path, device: torch.device, *, models: int = 1) -> None:
        check_interface()
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"the compiled library cannot be loaded: {error}") from error
        self._new_handle = self._library.aoti_torch_new_tensor_handle  # of libtorch, which the library depends on
        self._new_handle.argtypes, self._new_handle.restype = [_Handle, ctypes.POINTER(_Handle)], ctypes.c_int
        self._from_blob = self._library.aoti_torch_create_tensor_from_blob
        self._from_blob.restype = ctypes.c_int
        self._from_blob.argtypes = [
            *(_Handle, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int64), ctypes.c_int64),
            *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(_Handle)),
        ]
        self._functions = {name: self._function(name) for name in _SIGNATURES}
        handle = _Handle()
        folder = str(path.parent).encode()
        self._check(self._functions["CreateWithDevice"](ctypes.byref(handle), models, str(device).encode(), folder))
        self._handle = handle.value
        self._device = device
        weakref.finalize(self, self._functions["Delete"], self._handle).atexit = False
        self.held: list[torch.Tensor] = []  # the constants, whose memory the library reads
        self.inputs = self._count("GetNumInputs")
        self.outputs = self._count("GetNumOutputs")
        self.constants = self._names()

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read the constants from these tensors' own memory from now on; not while it runs.

        Args:
            tensors: by the names in ``constants``' keys; the memory is shared, so a change in place counts at once.
        """
        held = [tensors[fqn].detach() for fqn in self.constants]
        if not held:
            return
        handles = [self._view(tensor) for tensor in held]
        names = list(self.constants.values())
        entries = (_Entry * len(held))(*(_Entry(name, handle) for name, handle in zip(names, handles, strict=True)))
        try:
            self._check(
                self._functions["UpdateUserManagedConstantBufferPairs"](self._handle, entries, len(held), False, True)
            )
        finally:
            for handle in handles:
                _aoti().alloc_tensor_by_stealing_from_void_ptr(_capsule(handle))  # frees it; the library keeps its own
        self.held = held

    def values(self) -> dict[str, torch.Tensor]:
        """Copies of the constants as they were compiled in, by the names in ``constants``' keys."""
        entries, number = ctypes.POINTER(_Entry)(), _Size()
        self._check(
            self._functions["ExtractConstantsMapEntries"](
                self._handle, ctypes.byref(entries), ctypes.byref(number), False
            )
        )
        copied: dict[str, torch.Tensor] = {}
        for at in range(number.value):
            own = _Handle()
            self._check(self._new_handle(entries[at].handle, ctypes.byref(own)))
            tensor = _aoti().alloc_tensor_by_stealing_from_void_ptr(_capsule(own.value))
            copied[entries[at].name.decode()] = tensor.detach().clone(memory_format=torch.preserve_format)
        return copied

    def caller(self) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        """A function from the inputs to the outputs; any thread may call it, ``models`` of them at the same time."""
        run, handle, inputs, outputs = self._functions["Run"], self._handle, self.inputs, self.outputs
        allocate, steal = _aoti().unsafe_alloc_void_ptr_from_tensor, _aoti().alloc_tensor_by_stealing_from_void_ptr
        pointer, capsule, check, stream = _address, _capsule, self._check, _stream_of(self._device)
        given_to, made_by = _Handle * inputs, _Handle * outputs

        def call(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            given = given_to(*[pointer(allocate(tensor)) for tensor in tensors])  # the library frees them
            made = made_by()
            kept = self.held  # a call that was given up on may still read them after others were bound
            failed = run(handle, given, inputs, made, outputs, stream(), None)
            del kept
            if failed:
                check(failed)
            return [steal(capsule(address)) for address in made]

        return call

    def _view(self, tensor: torch.Tensor) -> int:
        """A handle to a tensor in the same memory that does not keep the memory.

        The library makes handles of its own from those it is given and never deletes them. If they kept the memory,
        every set of weights that was ever bound would stay.
        """
        kind, dtype = tensor.device.type, str(tensor.dtype).removeprefix("torch.")
        numbers = []
        for name in (f"aoti_torch_dtype_{dtype}", f"aoti_torch_device_type_{kind}"):
            number = getattr(self._library, name, None)
            if number is None:
                raise LibraryError(f"a compiled library cannot use weights that are {dtype} on {kind}")
            numbers.append(number())
        handle, dims = _Handle(), tensor.dim()
        sizes, strides = (ctypes.c_int64 * dims)(*tensor.shape), (ctypes.c_int64 * dims)(*tensor.stride())
        self._check(
            self._from_blob(
                tensor.data_ptr(), dims, sizes, strides, 0, *numbers, tensor.device.index or 0, ctypes.byref(handle)
            )
        )
        assert handle.value is not None
        return handle.value

    def _names(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for at in range(self._count("GetNumConstants")):
            name, fqn = ctypes.c_char_p(), ctypes.c_char_p()
            self._check(self._functions["GetConstantName"](self._handle, at, ctypes.byref(name)))
            self._check(self._functions["GetConstantOriginalFQN"](self._handle, at, ctypes.byref(fqn)))
            found[(fqn.value or b"").decode()] = name.value or b""
        if len(found) != self._count("GetNumConstants"):
            raise LibraryError("two constants of the compiled library have the same name")
        return found

    def _count(self, name: str) -> int:
        number = _Size()
        self._check(self._functions[name](self._handle, ctypes.byref(number)))
        return number.value

    def _function(self, name: str) -> Any:
        try:
            function = getattr(self._library, _PREFIX + name)
        except AttributeError as error:
            raise LibraryError(f"the compiled library lacks {_PREFIX}{name}: this torch is too old") from error
        function.argtypes, function.restype = _SIGNATURES[name], ctypes.c_int
        return function

    def _check(self, code: int) -> None:
        if not code:
            return
        said = ctypes.c_char_p()
        last = getattr(self._library, "AOTInductorGetLastError", None)
        if last is not None:
            last.argtypes = [ctypes.POINTER(ctypes.c_char_p)]
            last(ctypes.byref(said))
        raise LibraryError(f"the compiled program failed: {(said.value or b'it did not say why').decode()}")


def check_interface() -> None:
    """Raise `LibraryError` unless this torch lets tensors pass through a C interface."""
    needed = ("unsafe_alloc_void_ptr_from_tensor", "alloc_tensor_by_stealing_from_void_ptr")
    if not all(hasattr(getattr(torch._C, "_aoti", None), name) for name in needed):
        raise LibraryError(f"torch {torch.__version__} has no C interface to compiled models; torch 2.13 has")


def _aoti() -> Any:
    return torch._C._aoti


def _stream_of(device: torch.device) -> Callable[[], int | None]:
    """What says the stream to launch on: the calling thread's current one; the host has none."""
    if device.type == "cpu":
        return lambda: None
    return lambda: int(torch.cuda.current_stream(device).cuda_stream)


def _address(capsule: Any) -> int:
    """The pointer in a capsule without a name."""
    address: int = _get_pointer(capsule, None)
    return address


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.argtypes, _get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], _Handle
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, _Handle, ctypes.c_char_p, _Handle)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def _capsule(address: int | None) -> Any:
    return _new_capsule(address, None, None)
