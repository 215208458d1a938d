"""One call of attention on a CPU, and its gradients: torch's own tiled operator, which makes no matrix of scores.

With a softcap, which that operator has not, scores are held in memory: callers keep such calls small.
Rows that are no numbers spoil who sees them and nobody else, also beside rows that a mask hides from them: 0 * NaN is
NaN, so in a call with a mask they are taken out, and what sees them is spoilt afterwards. Callers that know of none
say so (`numbers`), and nobody looks.

Shapes: B batch, H heads, t query rows, n keys, D head_dim (v's may be another one).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Visible(NamedTuple):
    """What each row sees, bool [t, n] or [B, 1, t, n]; the same as numbers to add, fp32; which rows see no key."""

    seen: Tensor
    added: Tensor
    blind: Tensor

    @classmethod
    def between(cls, lowest: Tensor, past: Tensor, keys: int) -> Visible:
        """Rows that see the keys lowest <= key < past of n."""
        key = torch.arange(keys)
        seen = (key >= lowest[..., None]) & (key < past[..., None])
        return cls(seen, torch.where(seen, 0.0, -torch.inf), ~seen.any(-1))


def attend_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: bool | Visible,
    scale: float,
    softcap: float = 0.0,
    numbers: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, t, D] and log-sum-exp [B, H, t] of fp32 q, k, v: what is no number in q stays none.

    mask: False: all rows see all keys. True: causal, without softcap. numbers: whether all of k and v is finite.
    The operator gives zeros for a query row of NaN or infinity, as if nothing were wrong with it.
    """
    spoilt = None
    if isinstance(mask, Visible) and not numbers:
        bad = _no_numbers(k) | _no_numbers(v)
        if bad.any():
            k, v = (x.masked_fill(bad[..., None], 0.0) for x in (k, v))
            spoilt = _sees_any(mask.seen, bad)
    if softcap:
        weights, lse, _ = _held_scores(q, k, mask, None, scale, softcap)
        out = weights @ v
    else:
        q_wide, k_wide, v_wide = _equal_dims(q, k, v)
        added = mask.added if isinstance(mask, Visible) else None
        out, lse = _attend(q_wide, k_wide, v_wide, 0.0, mask is True, attn_mask=added, scale=scale)
        out = out[..., : v.shape[-1]]
    if isinstance(mask, Visible):
        lse = lse.masked_fill(mask.blind, -torch.inf)
    if spoilt is not None:
        out, lse = out.masked_fill(spoilt[..., None], torch.nan), lse.masked_fill(spoilt, torch.nan)
    nothing = 0.0 * q.sum(-1)  # NaN for such a row
    return out + nothing[..., None], lse + nothing


def gradients_on_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: bool | Visible,
    scale: float,
    softcap: float = 0.0,
    numbers: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_on_cpu` in q, k and v: fp32 [B, H, t or n, D]. out, lse: of all that the rows read.

    numbers: whether all but lse is finite, and lse finite or -inf.
    """
    # A row that reads nothing at all has no weights: here all of its scores are -inf, whatever its log-sum-exp.
    if isinstance(mask, Visible) and numbers:
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    if not isinstance(mask, Visible) or numbers:
        return _gradients(grad_out, q, k, v, out, lse, mask, scale, softcap)
    bad = _no_numbers(k) | _no_numbers(v)
    if bad.any():
        k, v = (x.masked_fill(bad[..., None], 0.0) for x in (k, v))
    spoilt = _no_numbers(q) | _no_numbers(grad_out) | _no_numbers(out) | ~(lse < torch.inf) | _sees_any(mask.seen, bad)
    if spoilt.any():
        grad_out, q, out = (x.masked_fill(spoilt[..., None], 0.0) for x in (grad_out, q, out))
    lse = lse.masked_fill(spoilt | (lse == -torch.inf), 0.0)
    grad_q, grad_k, grad_v = _gradients(grad_out, q, k, v, out, lse, mask, scale, softcap)
    if spoilt.any():
        seen = (bad | _sees_any(mask.seen.mT, spoilt))[..., None]
        grad_q = grad_q.masked_fill(spoilt[..., None], torch.nan)
        grad_k, grad_v = (x.masked_fill(seen, torch.nan) for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def _gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: bool | Visible,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if softcap:
        weights, _, slope = _held_scores(q, k, mask, lse, scale, softcap)
        pull = grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)
        grad_scores = weights * pull * slope
        return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad_out
    wide = _equal_dims(grad_out, q, k, v, out)
    added = mask.added if isinstance(mask, Visible) else None
    grads = _attend_backward(*wide, lse, 0.0, mask is True, attn_mask=added, scale=scale)
    return tuple(grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True))


def _held_scores(
    q: Tensor, k: Tensor, mask: bool | Visible, lse: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of capped scores, log-sum-exp unless given, slope of the scores in q . k. [B, H, t, n] but lse."""
    capped = torch.tanh(q @ k.mT * (scale / softcap))
    scores = softcap * capped
    if isinstance(mask, Visible):
        scores = scores.masked_fill(~mask.seen, -torch.inf)
    if lse is None:
        lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return weights, lse, scale * (1.0 - capped.square())


def _equal_dims(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All padded with zeros to the longest head_dim: the operator wants equal ones."""
    longest = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == longest else pad(x, (0, longest - x.shape[-1])) for x in tensors)


def _no_numbers(x: Tensor) -> Tensor:
    """Which rows hold NaN or infinity, bool [B, H, t]."""
    return ~torch.isfinite(x).all(-1)


def _sees_any(seen: Tensor, bad: Tensor) -> Tensor:
    """Which rows see one of the bad keys, bool [B, H, t]. seen: [t, n] or [B, 1, t, n]. bad: [B, H, n]."""
    if not bad.any():
        return torch.zeros((), dtype=torch.bool)
    return (seen.float() @ bad[..., None].float())[..., 0] > 0
