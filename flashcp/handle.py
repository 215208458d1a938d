"""K and V rows on their way, as `ContextParallel.prefetch` returns them, and attention over them."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from flashcp.call import Layer
from flashcp.eager import EagerAttention
from flashcp.kernels.inputs import check_inputs, check_return_lse
from flashcp.kernels.scores import Scores, read_scores
from flashcp.operator import attention


class Handle:
    """K and V rows on their way, for one attention call.

    begun: the call's number. caller_number, plan: numbers too, of the `ContextParallel` and of its plan.
    """

    def __init__(self, begun: Tensor, k: Tensor, v: Tensor, caller_number: Tensor, plan: Tensor, layer: Layer) -> None:
        self._begun, self._k, self._v = begun, k, v
        self._caller_number, self._plan, self._layer = caller_number, plan, layer

    @overload
    def attention(
        self, q: Tensor, softmax_scale: float | None = None, *, softcap: float | None = None,
        sinks: Tensor | None = None, return_lse: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attention(
        self, q: Tensor, softmax_scale: float | None = None, *, softcap: float | None = None,
        sinks: Tensor | None = None, return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def attention(
        self,
        q: Tensor,
        softmax_scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See ContextParallel.attention. Raises RuntimeError when called twice, or when k or v were written to."""
        if not torch.compiler.is_compiling():  # what no operator can be handed
            check_inputs(q, self._k, self._v)
            check_return_lse(return_lse)
        q, _, _ = autocast(q, self._k, self._v)
        scores = read_scores(q, softmax_scale, softcap, sinks)
        return run(q, self._k, self._v, scores, self._begun, self._caller_number, self._plan, self._layer, return_lse)


def run(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, begun: Tensor | None, caller_number: Tensor, plan: Tensor,
    layer: Layer, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The operator, with what it is handed, and of its results those that were asked for."""
    calls = attention if torch.compiler.is_compiling() else EagerAttention.apply
    out, lse, *_ = calls(
        q, k, v, scores.sinks, begun, caller_number, plan, scores.scale, scores.softcap, *layer, return_lse,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast: the tensors in the dtype that it computes matrix products in. What is no tensor stays."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype.itemsize <= 4 else x for x in tensors)
