"""Streams that own a part of the GPU's multiprocessors: green contexts.

PyTorch's own (`torch.cuda.GreenContext`, 2.10 and later) takes a number of multiprocessors and cannot say which: up to
2.13 two of them may be given the same ones. So contexts that share none are made with NVIDIA's Python binding of
the driver, where it is installed, and handed to PyTorch as external streams.
"""

from __future__ import annotations

from typing import Any

import torch


class Unavailable(RuntimeError):
    """There are no green contexts here; the message says why."""


def by_torch(multiprocessors: int) -> tuple[Any, Any]:
    """(context, stream) of a green context of so many multiprocessors, by PyTorch alone. The context must be kept."""
    try:
        from torch.cuda import green_contexts as module
    except ImportError as error:
        raise Unavailable("this PyTorch has no green contexts") from error
    if not module.SUPPORTED:
        raise Unavailable("this PyTorch was built without green contexts")
    context: Any = module.GreenContext.create(num_sms=multiprocessors, device_id=0)
    if not hasattr(context, "Stream"):
        raise Unavailable("this PyTorch's green contexts give no stream")
    return context, context.Stream()


def by_driver(groups: int) -> tuple[list[Any], list[Any], list[int]]:
    """(contexts, streams, multiprocessors of each): the GPU in ``groups`` parts that share none."""
    try:
        from cuda.bindings import driver  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise Unavailable("the package cuda-bindings is not installed") from error
    torch.cuda.synchronize()  # the primary context is there
    device = asked(driver.cuDeviceGet(0))
    rest = asked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    each = rest.sm.smCount // groups // 8 * 8  # Hopper deals them out by eights
    if each < 8:
        raise Unavailable(f"{rest.sm.smCount} multiprocessors are too few for {groups} groups")
    split = driver.cuDevSmResourceSplitByCount(groups, rest, 0, each)
    check(split[0])
    contexts, streams, sizes = [], [], []
    for resource in split[1][:groups]:
        descriptor = asked(driver.cuDevResourceGenerateDesc([resource], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = asked(driver.cuGreenCtxCreate(descriptor, device, flags))
        stream = asked(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
        contexts.append(context)
        streams.append(torch.cuda.ExternalStream(int(stream), device=0))  # type: ignore[no-untyped-call]
        sizes.append(int(resource.sm.smCount))
    if len(streams) < groups:
        raise Unavailable(f"the driver made {len(streams)} groups of {groups}")
    return contexts, streams, sizes


def check(code: Any) -> None:
    """Raise where the driver says no."""
    if int(code) != 0:
        raise Unavailable(f"the driver refused: {code.name}")


def asked(answer: tuple[Any, ...]) -> Any:
    """The one value behind the driver's return code."""
    check(answer[0])
    return answer[1]
