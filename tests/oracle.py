"""DeepSeek-V2/V3's forward pass in plain float64 numpy, written from the published formulas.

It shares nothing with dsjax: it reads published tensor names and a config.json, expands keys and
values for every head, and sends tokens to their experts one by one. Slow and meant to be read.
Sources: DeepSeek-V2 (arXiv 2405.04434) section 2, DeepSeek-V3 (2412.19437) section 2, YaRN
(2309.00071).
"""

import math

import numpy as np

BLOCK = 128


def logits(tensors: dict[str, np.ndarray], config: dict, ids: np.ndarray) -> np.ndarray:
    """Logits [b, t, vocab] of tokens [b, t]."""
    weights = Weights(tensors)
    return np.stack([_sequence(weights, config, row) for row in ids])


class Weights:
    """Tensors by published name, in float64; FP8 ones multiplied by their blocks' scales."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __call__(self, name: str) -> np.ndarray:
        found = self._tensors[name].astype(np.float64)
        if f"{name}_scale_inv" in self._tensors:
            scale = self._tensors[f"{name}_scale_inv"].astype(np.float64)
            scale = scale.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)
            found = found * scale[: found.shape[0], : found.shape[1]]
        return found


def _sequence(w: Weights, config: dict, ids: np.ndarray) -> np.ndarray:
    eps = config["rms_norm_eps"]
    x = w("model.embed_tokens.weight")[ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + _attention(w, f"{at}.self_attn", config, _norm(w, f"{at}.input_layernorm", x, eps))
        normed = _norm(w, f"{at}.post_attention_layernorm", x, eps)
        dense = layer < config["first_k_dense_replace"]
        x = x + (_mlp(w, f"{at}.mlp", normed) if dense else _moe(w, f"{at}.mlp", config, normed))
    return _norm(w, "model.norm", x, eps) @ w("lm_head.weight").T


def _norm(w: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * w(f"{name}.weight")


def _attention(w: Weights, at: str, config: dict, x: np.ndarray) -> np.ndarray:
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    rope, v_dim, rank = config["qk_rope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]
    eps, time = config["rms_norm_eps"], len(x)
    if config["q_lora_rank"] is None:
        q = x @ w(f"{at}.q_proj.weight").T
    else:
        low = _norm(w, f"{at}.q_a_layernorm", x @ w(f"{at}.q_a_proj.weight").T, eps)
        q = low @ w(f"{at}.q_b_proj.weight").T
    q = q.reshape(time, heads, nope + rope)
    low = x @ w(f"{at}.kv_a_proj_with_mqa.weight").T
    latent = _norm(w, f"{at}.kv_a_layernorm", low[:, :rank], eps)
    shared_key = _rope(config, low[:, rank:])
    kv = (latent @ w(f"{at}.kv_b_proj.weight").T).reshape(time, heads, nope + v_dim)
    out = np.empty((time, heads, v_dim))
    for head in range(heads):
        query = np.concatenate([q[:, head, :nope], _rope(config, q[:, head, nope:])], axis=1)
        key = np.concatenate([kv[:, head, :nope], shared_key], axis=1)
        scores = query @ key.T * _softmax_scale(config)
        scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
        out[:, head] = _softmax(scores) @ kv[:, head, nope:]
    return out.reshape(time, -1) @ w(f"{at}.o_proj.weight").T


def _rope(config: dict, x: np.ndarray) -> np.ndarray:
    """Pairs (x[2i], x[2i+1]) as complex numbers, turned by position times frequency."""
    freq, size = _frequencies(config)
    turn = size * np.exp(1j * np.outer(np.arange(len(x)), freq))
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _frequencies(config: dict) -> tuple[np.ndarray, float]:
    """Angle a position of each pair, and the length YaRN gives to rotated vectors."""
    dim, theta, yarn = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    freq = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if yarn is None:
        return freq, 1.0
    context, factor = yarn["original_max_position_embeddings"], yarn["factor"]
    fast, slow = (
        dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (yarn["beta_fast"], yarn["beta_slow"])
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
    if low == high:
        high += 0.001
    slowed = np.array([min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)])
    return freq / factor * slowed + freq * (1 - slowed), _rotated_size(yarn)


def _rotated_size(yarn: dict) -> float:
    if yarn["mscale"] and yarn["mscale_all_dim"]:
        factor = yarn["factor"]
        return _mscale(factor, yarn["mscale"]) / _mscale(factor, yarn["mscale_all_dim"])
    return _mscale(yarn["factor"], 1)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _softmax_scale(config: dict) -> float:
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    yarn = config["rope_scaling"]
    if yarn is not None and yarn["mscale_all_dim"]:
        scale *= _mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    return scale


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _mlp(w: Weights, at: str, x: np.ndarray) -> np.ndarray:
    gate, up = x @ w(f"{at}.gate_proj.weight").T, x @ w(f"{at}.up_proj.weight").T
    return (gate / (1 + np.exp(-gate)) * up) @ w(f"{at}.down_proj.weight").T


def _moe(w: Weights, at: str, config: dict, x: np.ndarray) -> np.ndarray:
    affinity = x @ w(f"{at}.gate.weight").T
    sigmoid = config["scoring_func"] == "sigmoid"
    affinity = 1 / (1 + np.exp(-affinity)) if sigmoid else _softmax(affinity)
    bias = np.zeros(config["n_routed_experts"])
    if config["topk_method"] == "noaux_tc":
        bias = w(f"{at}.gate.e_score_correction_bias")
    out = _mlp(w, f"{at}.shared_experts", x) if config["n_shared_experts"] else np.zeros_like(x)
    for token, scores in enumerate(affinity):
        for expert, weight in _route(config, scores, scores + bias):
            row = x[token : token + 1]
            out[token] += weight * _mlp(w, f"{at}.experts.{expert}", row)[0]
    return out


def _route(config: dict, scores: np.ndarray, ranking: np.ndarray) -> list[tuple[int, float]]:
    """The experts of one token and their weights."""
    if config["topk_method"] != "greedy":
        groups = ranking.reshape(config["n_group"], -1)
        count = 2 if config["topk_method"] == "noaux_tc" else 1
        strength = np.sort(groups, axis=1)[:, -count:].sum(axis=1)
        kept = np.argsort(-strength, kind="stable")[: config["topk_group"]]
        masked = np.full_like(groups, -np.inf)
        masked[kept] = groups[kept]
        ranking = masked.reshape(-1)
    chosen = np.argsort(-ranking, kind="stable")[: config["num_experts_per_tok"]]
    weights = scores[chosen]
    if config["norm_topk_prob"]:
        weights = weights / (weights.sum() + 1e-20)
    return list(zip(chosen, weights * config["routed_scaling_factor"], strict=True))
