"""GPT-2 in NumPy with gradients worked out by hand: the model's equations, without autograd.

Read it beside ``minigpt_cli/model/gpt.py``; the tests hold the two against each other. Everything
is float64. Every ``f`` has an ``f_backward`` that takes the gradient of the loss L with respect to
f's output (written ``dy`` for dL/dy) and returns it with respect to f's inputs, by the chain rule.

Shapes: B sequences, T tokens, H hidden size, A heads, D = H/A head dimension, V vocabulary.
Weights go by the model's parameter names, matrices are (out, in).
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IGNORE_INDEX = -100


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """y = x W^T + b, with x (..., in) and W (out, in)."""
    return x @ weight.T + bias


def linear_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """dx = dy W,  dW = sum over tokens of dy^T x,  db = sum over tokens of dy."""
    flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    return dy @ weight, flat_dy.T @ flat_x, flat_dy.sum(0)


def layer_norm(x: Array, gain: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """y = gain * n + bias with n = (x - mean) / s, s = sqrt(var + eps) (Ba et al. 2016).

    Mean and (biased) variance are over the last axis. Returns y, n and s.
    """
    s = np.sqrt(x.var(-1, keepdims=True) + eps)
    n = (x - x.mean(-1, keepdims=True)) / s
    return gain * n + bias, n, s


def layer_norm_backward(dy: Array, gain: Array, n: Array, s: Array) -> tuple[Array, Array, Array]:
    """dgain = sum dy * n,  dbias = sum dy,  dx = (dn - mean(dn) - n mean(dn * n)) / s.

    With dn = dy * gain. The two means are what x does to the mean and to the variance.
    """
    axes = tuple(range(dy.ndim - 1))
    dn = dy * gain
    dx = (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / s
    return dx, (dy * n).sum(axes), dy.sum(axes)


def gelu(x: Array) -> Array:
    """x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_backward(dy: Array, x: Array) -> Array:
    """dx = dy [ (1 + tanh u)/2 + x/2 (1 - tanh^2 u) u' ],  u' = sqrt(2/pi) (1 + 3*0.044715 x^2)."""
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope)


def softmax(x: Array) -> Array:
    """exp(x_i) / sum_j exp(x_j) over the last axis; minus the maximum, so nothing overflows."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def split_heads(x: Array, heads: int) -> Array:
    """(B, T, H) -> (B, A, T, D)."""
    batch, tokens, hidden = x.shape
    return x.reshape(batch, tokens, heads, hidden // heads).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """(B, A, T, D) -> (B, T, H), the inverse of ``split_heads`` and so its own gradient."""
    batch, heads, tokens, dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * dim)


def attention(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """y = P v with P = softmax(q k^T / sqrt(D)), and no weight on later tokens (Vaswani 2017).

    q, k, v are (B, A, T, D). Returns y (B, A, T, D) and P (B, A, T, T).
    """
    tokens, dim = q.shape[-2:]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(dim)
    later = np.triu(np.ones((tokens, tokens), dtype=bool), 1)
    p = softmax(np.where(later, -np.inf, scores))
    return p @ v, p


def attention_backward(
    dy: Array, q: Array, k: Array, v: Array, p: Array
) -> tuple[Array, Array, Array]:
    """dv = P^T dy,  dP = dy v^T,  dS = P * (dP - rowsum(dP * P)),  dq = dS k,  dk = dS^T q.

    dS is the softmax's gradient; dq and dk are divided by sqrt(D) like the scores. A masked entry
    has P = 0 and so no gradient.
    """
    dp = dy @ v.swapaxes(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy


def cross_entropy(logits: Array, targets: NDArray[np.int64], mean: bool) -> tuple[float, Array]:
    """L = -sum of log softmax(logits)[target], and dL/dlogits = softmax(logits) - one_hot(target).

    logits (N, V), targets (N,). Targets of ``IGNORE_INDEX`` count for nothing. With ``mean``
    both are divided by the number of targets that count.
    """
    counts = targets != IGNORE_INDEX
    index = np.where(counts, targets, 0)
    rows = np.arange(len(targets))
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    losses = np.where(counts, log_sum - logits[rows, index], 0.0)
    d_logits = softmax(logits)
    d_logits[rows, index] -= 1
    d_logits[~counts] = 0
    total = counts.sum() if mean else 1
    return float(losses.sum() / total), d_logits / total


def gpt2_loss_and_gradients(
    weights: dict[str, Array],
    ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    *,
    heads: int,
    eps: float = 1e-5,
    mean: bool = False,
) -> tuple[float, dict[str, Array]]:
    """The loss of a GPT-2 (Radford et al. 2019) and its gradient for every parameter.

    x = embed_tokens[ids] + embed_positions
    each layer:  x = x + o_proj(attention(qkv_proj(layer_norm(x))))
                 x = x + down_proj(gelu(up_proj(layer_norm(x))))
    logits = layer_norm(x) embed_tokens^T        (the head is tied to the embedding)

    Going back, the gradient of x + f(x) is dx + f'(dx): the residual stream carries it past f
    unchanged and f adds its own share.

    Args:
        ids, targets: (B, T).
        mean: the mean over the targets that count instead of their sum.
    """
    w = weights
    batch, tokens = ids.shape
    layers = sum(name.endswith("self_attn.qkv_proj.weight") for name in w)

    # Forward, keeping what backward needs.
    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][:tokens]
    kept = []
    for layer in range(layers):
        p = f"layers.{layer}."
        a, n1, s1 = layer_norm(
            x, w[p + "input_layernorm.weight"], w[p + "input_layernorm.bias"], eps
        )
        qkv = linear(a, w[p + "self_attn.qkv_proj.weight"], w[p + "self_attn.qkv_proj.bias"])
        q, k, v = (split_heads(part, heads) for part in np.split(qkv, 3, axis=-1))
        y, probs = attention(q, k, v)
        y = join_heads(y)
        x = x + linear(y, w[p + "self_attn.o_proj.weight"], w[p + "self_attn.o_proj.bias"])
        m, n2, s2 = layer_norm(
            x,
            w[p + "post_attention_layernorm.weight"],
            w[p + "post_attention_layernorm.bias"],
            eps,
        )
        up = linear(m, w[p + "mlp.up_proj.weight"], w[p + "mlp.up_proj.bias"])
        x = x + linear(gelu(up), w[p + "mlp.down_proj.weight"], w[p + "mlp.down_proj.bias"])
        kept.append((a, n1, s1, q, k, v, probs, y, m, n2, s2, up))
    h, n, s = layer_norm(x, w["norm.weight"], w["norm.bias"], eps)
    logits = h @ w["embed_tokens.weight"].T
    loss, d_logits = cross_entropy(logits.reshape(batch * tokens, -1), targets.reshape(-1), mean)

    # Backward, in the opposite order.
    g: dict[str, Array] = {}
    d_logits = d_logits.reshape(logits.shape)
    dh = d_logits @ w["embed_tokens.weight"]
    # The tied matrix gets a share as the head here, and one as the embedding at the very end.
    g["embed_tokens.weight"] = np.einsum("btv,bth->vh", d_logits, h)
    dx, g["norm.weight"], g["norm.bias"] = layer_norm_backward(dh, w["norm.weight"], n, s)
    for layer in reversed(range(layers)):
        p = f"layers.{layer}."
        a, n1, s1, q, k, v, probs, y, m, n2, s2, up = kept[layer]

        name = p + "mlp.down_proj."
        d_act, g[name + "weight"], g[name + "bias"] = linear_backward(
            dx, gelu(up), w[name + "weight"]
        )
        name = p + "mlp.up_proj."
        dm, g[name + "weight"], g[name + "bias"] = linear_backward(
            gelu_backward(d_act, up), m, w[name + "weight"]
        )
        name = p + "post_attention_layernorm."
        branch, g[name + "weight"], g[name + "bias"] = layer_norm_backward(
            dm, w[name + "weight"], n2, s2
        )
        dx = dx + branch

        name = p + "self_attn.o_proj."
        dy, g[name + "weight"], g[name + "bias"] = linear_backward(dx, y, w[name + "weight"])
        d_heads = attention_backward(split_heads(dy, heads), q, k, v, probs)
        d_qkv = np.concatenate([join_heads(part) for part in d_heads], axis=-1)
        name = p + "self_attn.qkv_proj."
        da, g[name + "weight"], g[name + "bias"] = linear_backward(d_qkv, a, w[name + "weight"])
        name = p + "input_layernorm."
        branch, g[name + "weight"], g[name + "bias"] = layer_norm_backward(
            da, w[name + "weight"], n1, s1
        )
        dx = dx + branch

    # A token that occurs twice gets both gradients, so add at each occurrence.
    np.add.at(g["embed_tokens.weight"], ids, dx)
    g["embed_positions.weight"] = np.zeros_like(w["embed_positions.weight"])
    g["embed_positions.weight"][:tokens] = dx.sum(0)
    return loss, g
