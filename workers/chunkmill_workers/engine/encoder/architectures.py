"""From a model that transformers loaded to an `Encoder`: which of its tensors is what.

A model outside these families, or one whose configuration asks for something that the encoder does not do,
runs through transformers' own forward instead (`chunkmill_workers.engine.backends.generic`).
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
"""From (out, in) weights, (out,) bias and an activation's name."""


@dataclass(frozen=True, slots=True)
class Build:
    """Where an encoder is to run, and in which number format."""

    dtype: torch.dtype
    device: torch.device
    slots: int
    """The usual number of tokens in a pass."""
    max_tokens: int
    products: Products | None = None
    """Makes the linear layers in place of `make_linear`, in the order of the model's layers."""

    @property
    def residual(self) -> torch.dtype:
        # bf16 has too few bits to add up twelve layers in; fp16's three more are enough.
        return torch.float16 if self.dtype == torch.float16 else torch.float32

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Whatever is no product's weight: embeddings and norms, in the residual's format."""
        return values.detach().to(self.device, self.residual)

    def norm(self, module: Any, *, rms: bool = False) -> Norm:
        bias = getattr(module, "bias", None)
        eps = module.variance_epsilon if rms else module.eps
        return Norm(self.tensor(module.weight), None if bias is None else self.tensor(bias), eps, rms)

    def linear(self, *modules: Any, activation: str | None = None) -> Linear:
        """One product for several layers that read the same input, side by side."""
        weight = torch.cat([each.weight for each in modules])
        biases = [each.bias for each in modules if each.bias is not None]
        if biases and len(biases) < len(modules):
            biases = [
                each.bias if each.bias is not None else each.weight.new_zeros(len(each.weight)) for each in modules
            ]
        bias = torch.cat(biases) if biases else None
        if self.products is not None:
            return self.products(weight, bias, activation)
        return make_linear(weight, bias, dtype=self.dtype, device=self.device, slots=self.slots, activation=activation)


def build_encoder(model: Any, build: Build) -> Encoder | None:
    """The model's encoder, or None where it has to run through transformers."""
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
    """BERT, and RoBERTa's kind, which counts positions from the padding id."""
    config, embeddings = model.config, model.embeddings
    if config.hidden_act not in ACTIVATIONS or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    layers = [
        Layer(
            qkv=build.linear(each.attention.self.query, each.attention.self.key, each.attention.self.value),
            out=build.linear(each.attention.output.dense),
            up=build.linear(each.intermediate.dense, activation=config.hidden_act),
            down=build.linear(each.output.dense),
            attention_norm=build.norm(each.attention.output.LayerNorm),
            mlp_norm=build.norm(each.output.LayerNorm),
            pattern=Pattern(),
        )
        for each in model.encoder.layer
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
            qkv=build.linear(each.attention.attn.q, each.attention.attn.k, each.attention.attn.v),
            out=build.linear(each.attention.attn.o),
            up=build.linear(each.intermediate.dense, activation=config.hidden_act),
            down=build.linear(each.output.dense),
            attention_norm=build.norm(each.attention.LayerNorm),
            mlp_norm=build.norm(each.output.LayerNorm),
            pattern=Pattern(),
        )
        for each in model.encoder.layer
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
    """MPNet's bias depends on the distance alone, so one vector per head holds all of it."""
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
            qkv=build.linear(each.self_attn.q_proj, each.self_attn.k_proj, each.self_attn.v_proj),
            out=build.linear(each.self_attn.o_proj),
            up=build.linear(each.mlp.gate_proj, each.mlp.up_proj),
            gate=ACTIVATIONS[config.hidden_act],
            down=build.linear(each.mlp.down_proj),
            attention_norm=build.norm(each.post_attention_layernorm),
            mlp_norm=build.norm(each.post_mlp_layernorm),
            pattern=Pattern(),
            rotary=0,
        )
        for each in model.layers
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
    kinds = sorted(set(config.layer_types))
    rotaries = [_rotary(model.rotary_emb, build, kind) for kind in kinds]
    if None in rotaries or config.hidden_activation not in ACTIVATIONS:
        return None
    layers = []
    for each in model.layers:
        first = isinstance(each.attn_norm, torch.nn.Identity)
        layers.append(
            Layer(
                qkv=build.linear(each.attn.Wqkv),
                out=build.linear(each.attn.Wo),
                up=build.linear(each.mlp.Wi),
                gate=ACTIVATIONS[config.hidden_activation],
                down=build.linear(each.mlp.Wo),
                attention_norm=None if first else build.norm(each.attn_norm),
                mlp_norm=build.norm(each.mlp_norm),
                # transformers counts the window's edge as FlashAttention does, inclusive, and adds one before.
                pattern=Pattern(window=None if each.attn.sliding_window is None else each.attn.sliding_window - 1),
                rotary=kinds.index(each.attention_type),
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
        rotaries=tuple(each for each in rotaries if each is not None),
        heads=_heads(config),
        dtype=build.dtype,
        residual=build.residual,
    )


def _qwen3(model: Any, build: Build) -> Encoder | None:
    config = model.config
    rotary = _rotary(model.rotary_emb, build)
    # transformers would look both ways where a configuration says so; then it shall.
    if rotary is None or config.hidden_act not in ACTIVATIONS or not getattr(config, "is_causal", True):
        return None
    layers = [
        Layer(
            qkv=build.linear(each.self_attn.q_proj, each.self_attn.k_proj, each.self_attn.v_proj),
            out=build.linear(each.self_attn.o_proj),
            up=build.linear(each.mlp.gate_proj, each.mlp.up_proj),
            gate=ACTIVATIONS[config.hidden_act],
            down=build.linear(each.mlp.down_proj),
            attention_norm=build.norm(each.input_layernorm, rms=True),
            mlp_norm=build.norm(each.post_attention_layernorm, rms=True),
            # transformers' causal window counts the token itself.
            pattern=Pattern(
                causal=True,
                window=None if each.self_attn.sliding_window is None else each.self_attn.sliding_window - 1,
            ),
            rotary=0,
            query_norm=build.norm(each.self_attn.q_norm, rms=True),
            key_norm=build.norm(each.self_attn.k_norm, rms=True),
        )
        for each in model.layers
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
    """The model's own tables, so that its scaling rules hold; None where they change with a text's length."""
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
