"""Two-plane products by AND and popcount in PyTorch: planes on any device, the kernel on a GPU."""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_binq.formats.activations import quantize
from lit_binq.formats.packing import unpack_signs
from lit_binq.formats.two_plane.device import PlanesPart, matmul, planes_of, usable
from two_plane_problems import Problem, activations, problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch: it then runs the kernel on the CPU, slowly."""

DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = [(5, 70, 256, 64), (33, 65, 200, 24), (1, 3, 8, 8), (17, 130, 77, 128)]
"""(M, N, K, g): words and bytes, padding, tails."""

INPUTS = [(4, 0, False), (4, 32, False), (4, 24, True), (8, 0, False)]


def unpacked(packed: Tensor, columns: int) -> Tensor:
    """(..., bytes) uint8 to (..., columns) int64 of 0 and 1."""
    flat = unpack_signs(packed.flatten(0, -2).cpu(), columns) > 0
    return flat.long().unflatten(0, packed.shape[:-1])


def stored(p: Problem, M: int, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """x (M, K) in stored order and the tensors of the layer."""
    x = activations(M, p.K)
    tensors = {name: torch.from_numpy(t).to(device) for name, t in p.tensors().items()}
    return torch.from_numpy(np.ascontiguousarray(x[:, p.order])).to(device), tensors


@pytest.mark.parametrize(("M", "N", "K", "g"), SHAPES)
@pytest.mark.parametrize(("bits", "outliers", "static"), INPUTS)
def test_planes_are_the_quantized_input(M: int, N: int, K: int, g: int, bits: int, outliers: int, static: bool) -> None:
    p = problem(N, K, group=g, bits=bits, outliers=outliers if outliers < K else 0, static=static)
    x, t = stored(p, M)
    options = (p.bits, len(p.outliers), t["input_scales"], t["input_range"])
    parts = planes_of(x, *options)
    assert [part.first for part in parts] + [parts[-1].last] == [0, *(part.last for part in parts)]
    rounded = []
    for part in parts:
        bits_of_part = unpacked(part.planes, part.last - part.first)
        assert int(bits_of_part[:, -1].min()) == 1
        rounded.append((bits_of_part * part.sizes[:, :, None].double()).sum(1))
    want = quantize(x, bits=options[0], outliers=options[1], scales=options[2], input_range=options[3])
    torch.testing.assert_close(torch.cat(rounded, 1), want.double(), rtol=0, atol=1e-6 * float(want.abs().max()))


def test_usable_says_no_on_the_host() -> None:
    assert not usable(torch.zeros(1, 64), 64, 4, 0)


def counts_of(p: Problem, part: PlanesPart) -> tuple[Tensor, Tensor]:
    """y (M, N) and counts (G, k, 3, M, N) of one part, by the kernel."""
    from lit_binq.formats.two_plane.triton import add_part

    tensors = {name: torch.from_numpy(t).to(DEVICE) for name, t in p.tensors().items()}
    levels, M, k = tensors["levels"], part.planes.shape[0], part.planes.shape[1]
    y = torch.zeros(M, p.N, device=DEVICE)
    counts = torch.zeros(levels.shape[1], k, 3, M, p.N, dtype=torch.int32, device=DEVICE)
    weights = (tensors["codes"], tensors["selector"], levels)
    add_part(part.planes, part.sizes, *weights, y, part.first, part.last, p.group, p.K, counts)
    return y.cpu(), counts.cpu()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize(("M", "N", "K", "g"), SHAPES)
@pytest.mark.parametrize(("bits", "outliers", "static"), INPUTS)
def test_counts_are_the_definition(
    L: int, M: int, N: int, K: int, g: int, bits: int, outliers: int, static: bool
) -> None:
    p = problem(N, K, L=L, group=g, bits=bits, outliers=outliers if outliers < K else 0, static=static)
    x, t = stored(p, M, DEVICE)
    A, B = (torch.from_numpy(bits_of_weights.astype(np.int64)) for bits_of_weights in (p.A, p.B))
    for part in planes_of(x, p.bits, len(p.outliers), t["input_scales"], t["input_range"]):
        q = unpacked(part.planes, part.last - part.first)  # (M, k, columns)
        _, counts = counts_of(p, part)
        for group in range(counts.shape[0]):
            columns = [j for j in range(group * g, min(K, group * g + g)) if part.first <= j < part.last]
            here = q[:, :, [j - part.first for j in columns]]
            both = A & B if L == 4 else torch.zeros_like(A)
            for i, bits_of_weights in enumerate((A, B, both)):
                want = torch.einsum("mkj,nj->kmn", here, bits_of_weights[:, columns])
                assert torch.equal(counts[group, :, i].long(), want)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize(("M", "N", "K", "g"), SHAPES)
@pytest.mark.parametrize(("bits", "outliers", "static"), INPUTS)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_the_quantized_ones(
    L: int, M: int, N: int, K: int, g: int, bits: int, outliers: int, static: bool, bias: bool
) -> None:
    p = problem(N, K, L=L, group=g, bits=bits, outliers=outliers if outliers < K else 0, static=static, bias=bias)
    x, t = stored(p, M, DEVICE)
    weights = (t["codes"], t["selector"], t["levels"], t["input_scales"], t["input_range"], t.get("bias"))
    y = matmul(x[:, None], *weights, K, g, p.bits, len(p.outliers))
    assert y.shape == (M, 1, N)
    raw = activations(M, K)
    error = np.abs(y[:, 0].cpu().numpy() - p.reference(raw))
    assert (error <= 1e-5 * p.magnitude(raw)).all()
