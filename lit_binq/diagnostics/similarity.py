"""How close two tensors are: a block's output and its tokens, ranks, attention.

Legend: y (b, T, d) full-precision block output, y^ its quantized counterpart; T positions, D and N widths. Functions
take one pair of tensors.
"""

import torch
from torch import Tensor


def block_error_sums(y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """sum |y^ - y|^2 and sum |y|^2 of a block's output: the relative error as papers define it.

    A few tokens with massive activations rule it: their norm is hundreds of times the others'.

    Args:
        y_hat: (b, T, d).
        y: (b, T, d).

    Returns:
        Two float32 scalars; sums over batches may be added up before they are divided.
    """
    return (y_hat.float() - y).square().sum(), y.float().square().sum()


def token_error_sums(y_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The relative squared error of each token, summed, and the number of tokens; else as `block_error_sums`.

    A norm layer comes next in every pre-norm model and keeps directions only, so this is what the next block feels.
    Ours.
    """
    error, norms = (y_hat.float() - y).square().sum(-1), y.float().square().sum(-1)
    ratio = error / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return ratio.sum(), torch.full((), float(norms.numel()), device=y.device)


def token_similarity(outputs: Tensor) -> Tensor:
    """Token Gram G = O O^T of one window's outputs, each token's output scaled to unit length.

    Source: arXiv 2512.21651, token interactions.

    Args:
        outputs: (T, N).

    Returns:
        (T, T) float32 cosines between tokens. A zero output gives zeros.
    """
    unit = torch.nn.functional.normalize(outputs.float(), dim=-1)
    return unit @ unit.T


def token_similarity_error(y_hat: Tensor, y: Tensor) -> Tensor:
    """Frobenius norm of the difference between the token Grams of two outputs of one window.

    Args:
        y_hat: (T, N).
        y: (T, N).

    Returns:
        () float32 in [0, 2 T].
    """
    return torch.linalg.matrix_norm(token_similarity(y_hat) - token_similarity(y))


def effective_rank(gram: Tensor) -> Tensor:
    """Effective rank of a matrix Y, from its Gram: exp of the entropy of its singular values, scaled to sum one.

    The definition of Roy and Vetterli (EUSIPCO 2007), on singular values, not on their squares (variances).

    Args:
        gram: (D, D), Y^T Y; taken in float64, where singular values below 1e-8 of the largest are rounding noise.

    Returns:
        () float64 in [1, D]; 0 for a zero matrix.
    """
    # A Gram's eigenvalues are exact to about 1e-16 of the largest, so their roots to 1e-8; noise must not add rank.
    values = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    values = torch.where(values > values[-1] * len(values) * torch.finfo(torch.float64).eps, values, 0).sqrt()
    total = values.sum()
    if not total > 0:
        return torch.full_like(total, 0.0 if bool(total == 0) else torch.nan)
    shares = values / total
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


def attention_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of KL(p || q) between two sets of attention maps, in nats.

    Masked keys have probability 0 in both and count nothing. Where only q is 0 (it underflowed), it counts as the
    smallest normal float32, about exp(-87).

    Args:
        p: (..., T, T), rows sum to one; the full-precision maps.
        q: (..., T, T).

    Returns:
        () float32.
    """
    tiny = torch.finfo(torch.float32).tiny
    sums = []
    # Map by map: temporaries of one (T, T) rather than of all heads.
    for a, b in zip(p.flatten(0, -3), q.flatten(0, -3), strict=True):
        a, b = a.float(), b.float().clamp_min(tiny)
        sums.append((torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1).mean())
    return torch.stack(sums).mean()
