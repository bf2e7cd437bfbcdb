"""Attention whose explanation mode takes the attention weights, and with them queries and keys, as constants.

What is left then is linear: every output token is a fixed mixture of the values (B-cos v2, arXiv 2306.10898).
Training and inference use PyTorch's scaled dot product attention.

Each class takes over the layers of an attention module of a known structure under their own names, so that its state dict
stays what it was. Which layers become B-cos layers is the conversion's business: it leaves alone those in ``plain``.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bcos_kernels import reference
from bcos_kernels.identity import known_class
from bcos_kernels.modules.detachable import DetachableModule

_SOFTMAX = "torch.nn.modules.activation.Softmax"


class DetachableAttention(DetachableModule):
    """The layers of ``source``, and :meth:`mix`."""

    if TYPE_CHECKING:  # nn.Module says `Tensor | Module`; the children are modules

        def __getattr__(self, name: str) -> Any: ...

    #: the classes that compute this, by name
    classes: ClassVar[tuple[str, ...]]
    #: children that they have at least
    structure: ClassVar[tuple[str, ...]]
    #: children that stay as they are in a conversion: they make queries and keys, or all of query, key and value
    plain: ClassVar[tuple[str, ...]]
    #: children that only make attention weights: they may be anything
    weights_only: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source._modules.items():
            self.add_module(name, child)
        self.detach = bool(getattr(source, "detach", False))
        self.training = source.training

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module computes what this class computes."""
        return known_class(module, cls.classes) is not None and cls.resembles(module)

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        """Whether the module has what this class needs; what it computes has to be found out otherwise."""
        return all(name in module._modules for name in cls.structure)

    @classmethod
    def why_not_called(cls, node: fx.Node) -> str | None:
        """What is wrong with a call of the module in a graph of ``torch.fx``: arguments that this class refuses, or None."""
        given = [*node.args[1:], *node.kwargs.values()]
        return (
            "a mask or other arguments besides its input"
            if any(g is not None and g is not False for g in given)
            else None
        )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, scale: float | None = None) -> Tensor:
        """``[N, heads, T, d]``, ``[N, heads, S, d]`` twice, to ``[N, T, heads * d]``."""
        dropout = dropout if self.training else 0.0
        if self.detach:
            out = reference.attention(q, k, v, scale=scale, dropout=dropout, detach_weights=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).flatten(2)


class SimpleViTAttention(DetachableAttention):
    """Attention of the simple ViTs, which normalises its own input: ``norm``, ``to_qkv``, ``to_out``.

    Shapes: ``[N, T, D]`` to the same. ``source`` also has ``heads``, and may have ``scale``.
    """

    classes = ("bcos.models.vit.Attention", "bcos_kernels/SimpleViTAttention")
    structure = ("norm", "to_qkv", "to_out")
    plain = ("to_qkv",)
    weights_only = ("attend",)

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.heads: int = source.heads  # type: ignore[assignment]
        self.scale: float | None = getattr(source, "scale", None)

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        attend = module._modules.get("attend")
        known = attend is None or (known_class(attend, (_SOFTMAX,)) is not None and getattr(attend, "dim", None) == -1)
        return super().resembles(module) and hasattr(module, "heads") and known

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _split_heads(self.to_qkv(self.norm(x)), 3, self.heads)
        return self.to_out(self.mix(q, k, v, scale=self.scale))


class AttentionPool2d(DetachableAttention):
    """CLIP's attention pool. The query is the mean over all locations; keys and values are the mean and every location.

    Shapes: ``[N, C, H, W]`` to ``[N, E]``. Children: ``q_proj``, ``k_proj``, ``v_proj``, ``c_proj``; ``source`` also has
    ``num_heads``. The positional embedding is kept only where asked for: B-cosification (arXiv 2411.00715) has none.
    ``c_proj`` may be a B-cos layer in name, as in the public checkpoints: the plain layer inside is what is applied.

    With ``unpool`` set there is no attention: each location is projected separately, to ``[N, H * W, E]`` (attention
    unpooling).
    """

    unpool: bool = False

    classes = ("clip.model.AttentionPool2d", "open_clip.modified_resnet.AttentionPool2d", "bcos_kernels/AttentionPool")
    structure = ("q_proj", "k_proj", "v_proj", "c_proj")
    plain = ("q_proj", "k_proj", "v_proj")

    def __init__(self, source: nn.Module, *, keep_positions: bool = False) -> None:
        super().__init__(source)
        self.num_heads: int = source.num_heads  # type: ignore[assignment]
        positions = source._parameters.get("positional_embedding")
        self.register_parameter("positional_embedding", positions if keep_positions else None)

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        return super().resembles(module) and hasattr(module, "num_heads")

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        if self.unpool:
            return self._project(self.v_proj(x))
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        pooled = self.mix(*(_split_heads(t, 1, self.num_heads)[0] for t in (q, k, v))).squeeze(1)
        return self._project(pooled)

    def _project(self, x: Tensor) -> Tensor:
        return getattr(self.c_proj, "linear", self.c_proj)(x)


class FusedAttention(DetachableAttention):
    """timm's attention: ``qkv``, optional norms of query and key and of the result, ``proj``.

    Shapes: ``[N, T, D]`` to the same. ``source`` also has ``num_heads``, and may have ``scale``, which timm uses only where
    it does not call PyTorch's attention (``fused_attn``).
    """

    classes = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
    structure = ("qkv", "proj")
    plain = ("qkv", "q_norm", "k_norm")
    weights_only = ("q_norm", "k_norm")
    #: a further child would do something that is not known here
    optional: ClassVar[frozenset[str]] = frozenset({"q_norm", "k_norm", "attn_drop", "norm", "proj_drop"})

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.num_heads: int = source.num_heads  # type: ignore[assignment]
        self.scale: float | None = None if getattr(source, "fused_attn", False) else getattr(source, "scale", None)

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        children = {name for name, child in module._modules.items() if child is not None}
        return (
            super().resembles(module)
            and hasattr(module, "num_heads")
            and children <= {*cls.structure, *cls.optional}
            and not module._parameters
            and not module._buffers
        )

    def _optional(self, name: str, x: Tensor) -> Tensor:
        layer = self._modules.get(name)
        return x if layer is None else layer(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError(
                "attn_mask, is_causal: masks are not supported by the converted attention; use None, False"
            )
        q, k, v = _split_heads(self.qkv(x), 3, self.num_heads)
        q, k = self._optional("q_norm", q), self._optional("k_norm", k)
        dropout = getattr(self._modules.get("attn_drop"), "p", 0.0)
        x = self._optional("norm", self.mix(q, k, v, dropout=dropout, scale=self.scale))
        return self._optional("proj_drop", self.proj(x))


class MultiheadSelfAttention(DetachableAttention):
    """``nn.MultiheadAttention`` for self-attention without masks; called and named as that is.

    Shapes: ``[N, T, D]`` (``batch_first``) or ``[T, N, D]`` to the same, and None in place of the attention weights.

    Raises:
        ValueError: when called with another key or value than the query, or with a mask.
    """

    classes = ("torch.nn.modules.activation.MultiheadAttention",)
    structure = ("out_proj",)
    plain = ()

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__(source)
        self.in_proj_weight = source.in_proj_weight
        self.in_proj_bias = source.in_proj_bias
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        self.batch_first = source.batch_first

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.MultiheadAttention)
            and module.in_proj_weight is not None  # one width for query, key and value
            and module.bias_k is None
            and not module.add_zero_attn
        )

    @classmethod
    def why_not_called(cls, node: fx.Node) -> str | None:
        names = (
            "query",
            "key",
            "value",
            "key_padding_mask",
            "need_weights",
            "attn_mask",
            "average_attn_weights",
            "is_causal",
        )
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given["key"] is not given["query"] or given["value"] is not given["query"]:
            return "another key or value than the query"
        if given.get("key_padding_mask") is not None or given.get("attn_mask") is not None or given.get("is_causal"):
            return "a mask"
        if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
            return "a use for its attention weights, which are not computed any more"
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ValueError("key and value must be the query itself: only self-attention was converted")
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise ValueError("key_padding_mask, attn_mask, is_causal: masks are not supported; use None, None, False")
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = _split_heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), 3, self.num_heads)
        x = self.out_proj(self.mix(q, k, v, dropout=self.dropout))
        return (x if self.batch_first else x.transpose(0, 1)), None


#: in the order in which they are tried
ATTENTIONS: tuple[type[DetachableAttention], ...] = (
    MultiheadSelfAttention,
    SimpleViTAttention,
    FusedAttention,
    AttentionPool2d,
)


def _split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """``[N, T, parts * heads * d]`` to ``[parts, N, heads, T, d]``."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)
