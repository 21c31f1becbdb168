"""From a model that transformers loaded to an `Encoder`: which tensor has which place in it.

A model of another family, or whose configuration needs something that the encoder does not do, runs through the forward
pass of transformers (`chunkmill_workers.engine.backends.generic`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chunkmill_workers.engine.encoder.attention import Heads, Pattern
from chunkmill_workers.engine.encoder.encoder import Encoder, Layer, Norm, Rotary
from chunkmill_workers.engine.encoder.linear import ACTIVATIONS, Linear, make_linear

Products = Callable[[torch.Tensor, torch.Tensor | None, str | None], Linear]
"""Makes a linear layer from (out, in) weights, (out,) bias and an activation's name."""


@dataclass(frozen=True, slots=True)
class Build:
    """How to build an encoder: for which device, and in which number format."""

    dtype: torch.dtype
    device: torch.device
    slots: int
    """The usual number of tokens in a pass."""
    max_tokens: int
    products: Products | None = None
    """What makes the linear layers, in the order of the model's layers; None for `make_linear`."""

    @property
    def residual(self) -> torch.dtype:
        """The number format of the residual stream, norms and embeddings."""
        # bf16 has too few bits to add up twelve layers. fp16 has three more, which is enough.
        return torch.float16 if self.dtype == torch.float16 else torch.float32

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """``values``, the weights of embeddings and norms, in the format of the residual stream."""
        return values.detach().to(self.device, self.residual)

    def norm(self, module: Any, *, rms: bool = False) -> Norm:
        """The norm with the weights of ``module``; ``rms`` for RMSNorm."""
        bias = getattr(module, "bias", None)
        eps = module.variance_epsilon if rms else module.eps
        return Norm(self.tensor(module.weight), None if bias is None else self.tensor(bias), eps, rms)

    def linear(self, *modules: Any, activation: str | None = None) -> Linear:
        """One product for several layers that read the same input. Their outputs are side by side."""
        weight = torch.cat([module.weight for module in modules])
        biases = [module.bias for module in modules if module.bias is not None]
        if biases and len(biases) < len(modules):
            biases = [
                module.bias if module.bias is not None else module.weight.new_zeros(len(module.weight))
                for module in modules
            ]
        bias = torch.cat(biases) if biases else None
        if self.products is not None:
            return self.products(weight, bias, activation)
        return make_linear(weight, bias, dtype=self.dtype, device=self.device, slots=self.slots, activation=activation)


def build_encoder(model: Any, build: Build) -> Encoder | None:
    """The model's encoder; None if the model has to run through transformers."""
    read = _FAMILIES.get(model.config.model_type)
    if (
        read is None
        or getattr(model.config, "is_decoder", False)
        or getattr(model.config, "add_cross_attention", False)
    ):
        return None
    with torch.inference_mode():
        encoder: Encoder | None = read(model, build)
        return encoder


def _bert(model: Any, build: Build) -> Encoder | None:
    """BERT, and the models of RoBERTa's kind, which count positions from the padding id."""
    config, embeddings = model.config, model.embeddings
    if config.hidden_act not in ACTIVATIONS or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    layers = [
        Layer(
            qkv=build.linear(layer.attention.self.query, layer.attention.self.key, layer.attention.self.value),
            out=build.linear(layer.attention.output.dense),
            up=build.linear(layer.intermediate.dense, activation=config.hidden_act),
            down=build.linear(layer.output.dense),
            attention_norm=build.norm(layer.attention.output.LayerNorm),
            mlp_norm=build.norm(layer.output.LayerNorm),
            pattern=Pattern(),
        )
        for layer in model.encoder.layer
    ]
    segment = embeddings.token_type_embeddings.weight[0].float()
    return Encoder(
        words=build.tensor(embeddings.word_embeddings.weight),
        positions=build.tensor(embeddings.position_embeddings.weight.float() + segment),
        pad_position=None if config.model_type == "bert" else embeddings.padding_idx,
        embedding_norm=build.norm(embeddings.LayerNorm),
        layers=tuple(layers),
        final_norm=None,
        norms_first=False,
        heads=_heads(config),
        dtype=build.dtype,
        residual=build.residual,
    )


def _mpnet(model: Any, build: Build) -> Encoder | None:
    config, embeddings = model.config, model.embeddings
    if config.hidden_act not in ACTIVATIONS:
        return None
    layers = [
        Layer(
            qkv=build.linear(layer.attention.attn.q, layer.attention.attn.k, layer.attention.attn.v),
            out=build.linear(layer.attention.attn.o),
            up=build.linear(layer.intermediate.dense, activation=config.hidden_act),
            down=build.linear(layer.output.dense),
            attention_norm=build.norm(layer.attention.LayerNorm),
            mlp_norm=build.norm(layer.output.LayerNorm),
            pattern=Pattern(),
        )
        for layer in model.encoder.layer
    ]
    return Encoder(
        words=build.tensor(embeddings.word_embeddings.weight),
        positions=build.tensor(embeddings.position_embeddings.weight),
        pad_position=embeddings.padding_idx,
        embedding_norm=build.norm(embeddings.LayerNorm),
        layers=tuple(layers),
        final_norm=None,
        norms_first=False,
        bias=_relative_bias(model.encoder, build),
        heads=_heads(config),
        dtype=build.dtype,
        residual=build.residual,
    )


def _relative_bias(encoder: Any, build: Build) -> Callable[[int], torch.Tensor]:
    """MPNet's position bias. It depends only on the distance of two tokens, so one vector for each head holds it."""
    furthest = build.max_tokens
    distances = torch.arange(-furthest, furthest + 1)  # key - query
    buckets = encoder.relative_position_bucket(distances[None], num_buckets=32)[0]
    by_distance: torch.Tensor = (
        encoder.relative_attention_bias.weight[buckets].t().float().to(build.device)
    )  # (heads, distances)

    def bias(longest: int) -> torch.Tensor:
        at = torch.arange(longest, device=build.device)
        return by_distance[:, at - at[:, None] + furthest][None]

    return bias


def _nomic(model: Any, build: Build) -> Encoder | None:
    config, embeddings = model.config, model.embeddings
    rotary = _rotary(model.rotary_emb, build)
    if rotary is None or config.hidden_act not in ACTIVATIONS:
        return None
    layers = [
        Layer(
            qkv=build.linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=build.linear(layer.self_attn.o_proj),
            up=build.linear(layer.mlp.gate_proj, layer.mlp.up_proj),
            gate=ACTIVATIONS[config.hidden_act],
            down=build.linear(layer.mlp.down_proj),
            attention_norm=build.norm(layer.post_attention_layernorm),
            mlp_norm=build.norm(layer.post_mlp_layernorm),
            pattern=Pattern(),
            rotary=0,
        )
        for layer in model.layers
    ]
    segment = embeddings.token_type_embeddings.weight[0].float()
    return Encoder(
        words=build.tensor(embeddings.word_embeddings.weight.float() + segment),
        positions=None,
        pad_position=None,
        embedding_norm=build.norm(embeddings.LayerNorm),
        layers=tuple(layers),
        final_norm=None,
        norms_first=False,
        rotaries=(rotary,),
        heads=_heads(config),
        dtype=build.dtype,
        residual=build.residual,
    )


def _modernbert(model: Any, build: Build) -> Encoder | None:
    config = model.config
    if not hasattr(config, "layer_types"):
        return None  # transformers before 5 builds its attention in another way
    kinds = sorted(set(config.layer_types))
    rotaries = [_rotary(model.rotary_emb, build, kind) for kind in kinds]
    if None in rotaries or config.hidden_activation not in ACTIVATIONS:
        return None
    layers = []
    for layer in model.layers:
        first = isinstance(layer.attn_norm, torch.nn.Identity)
        layers.append(
            Layer(
                qkv=build.linear(layer.attn.Wqkv),
                out=build.linear(layer.attn.Wo),
                up=build.linear(layer.mlp.Wi),
                gate=ACTIVATIONS[config.hidden_activation],
                down=build.linear(layer.mlp.Wo),
                attention_norm=None if first else build.norm(layer.attn_norm),
                mlp_norm=build.norm(layer.mlp_norm),
                # transformers adds one to the window of config.json; FlashAttention counts its edge as inside.
                pattern=Pattern(window=None if layer.attn.sliding_window is None else layer.attn.sliding_window - 1),
                rotary=kinds.index(layer.attention_type),
            )
        )
    return Encoder(
        words=build.tensor(model.embeddings.tok_embeddings.weight),
        positions=None,
        pad_position=None,
        embedding_norm=build.norm(model.embeddings.norm),
        layers=tuple(layers),
        final_norm=build.norm(model.final_norm),
        norms_first=True,
        rotaries=tuple(rotary for rotary in rotaries if rotary is not None),
        heads=_heads(config),
        dtype=build.dtype,
        residual=build.residual,
    )


def _qwen3(model: Any, build: Build) -> Encoder | None:
    config = model.config
    rotary = _rotary(model.rotary_emb, build)
    # A configuration may switch causal attention off; such a model runs through transformers.
    if rotary is None or config.hidden_act not in ACTIVATIONS or not getattr(config, "is_causal", True):
        return None
    layers = [
        Layer(
            qkv=build.linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=build.linear(layer.self_attn.o_proj),
            up=build.linear(layer.mlp.gate_proj, layer.mlp.up_proj),
            gate=ACTIVATIONS[config.hidden_act],
            down=build.linear(layer.mlp.down_proj),
            attention_norm=build.norm(layer.input_layernorm, rms=True),
            mlp_norm=build.norm(layer.post_attention_layernorm, rms=True),
            # The causal window of transformers counts the token itself, ours does not.
            pattern=Pattern(
                causal=True,
                window=None if layer.self_attn.sliding_window is None else layer.self_attn.sliding_window - 1,
            ),
            rotary=0,
            query_norm=build.norm(layer.self_attn.q_norm, rms=True),
            key_norm=build.norm(layer.self_attn.k_norm, rms=True),
        )
        for layer in model.layers
    ]
    return Encoder(
        words=build.tensor(model.embed_tokens.weight),
        positions=None,
        pad_position=None,
        embedding_norm=None,
        layers=tuple(layers),
        final_norm=build.norm(model.norm, rms=True),
        norms_first=True,
        rotaries=(rotary,),
        heads=_heads(config),
        dtype=build.dtype,
        residual=build.residual,
    )


_FAMILIES: dict[str, Callable[[Any, Build], Encoder | None]] = {
    "bert": _bert,
    "camembert": _bert,
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "nomic_bert": _nomic,
    "qwen3": _qwen3,
    "roberta": _bert,
    "xlm-roberta": _bert,
}
NATIVE_ARCHITECTURES: Sequence[str] = tuple(_FAMILIES)


def _rotary(module: Any, build: Build, *kind: str) -> Rotary | None:
    """The tables that the model itself makes, so its scaling rules hold; None if they depend on a text's length."""
    types = module.rope_type
    if (types[kind[0]] if kind else types) in ("dynamic", "longrope"):
        return None
    at = torch.arange(build.max_tokens)[None]
    cos, sin = module(torch.zeros(1, dtype=torch.float32), at, *kind)
    return Rotary(cos[0].to(build.device), sin[0].to(build.device))


def _heads(config: Any) -> Heads:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Heads(heads, getattr(config, "num_key_value_heads", None) or heads, size)
