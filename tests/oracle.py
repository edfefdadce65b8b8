"""The oracle: NumPy float64, from the papers' formulas, sharing no code with the library.

Everything here is slow and plain on purpose. Weights are dequantised to float64 (e2m1 * 2^(byte - 127) is
exact there, nothing is flushed), attention is the naive, non-absorbed one with a full score matrix.
"""

from __future__ import annotations

import math

import numpy as np

# OCP Microscaling Formats v1.0, section 5.3.3: codes 0..7; bit 3 is the sign.
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def e8m0(byte: np.ndarray) -> np.ndarray:
    """2^(byte - 127), and NaN for 255, as float64."""
    byte = np.asarray(byte)
    return np.where(byte == 255, np.nan, np.exp2(byte.astype(np.float64) - 127))


def e4m3(byte: np.ndarray) -> np.ndarray:
    """The e4m3fn value of each byte as float64: no infinities, 0x7F and 0xFF are NaN."""
    byte = np.asarray(byte).astype(np.int64)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    subnormal = mantissa * 2.0**-9
    normal = (8 + mantissa) * np.exp2(exponent.astype(np.float64) - 10)
    value = np.where(exponent == 0, subnormal, normal)
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return np.where(byte & 128, -value, value)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the value of an ascending grid 0 = grid[0] < ... nearest to |x|; ties to the even index.

    Past the end the last one. In a grid of all magnitudes of a float format an even index is an even mantissa.
    """
    magnitude = np.abs(np.asarray(x, np.float64))
    middles = (grid[:-1] + grid[1:]) / 2  # exact in float64 for grids of a few bits
    index = np.searchsorted(middles, magnitude, side="left")
    tie = (index < len(middles)) & (magnitude == np.append(middles, np.nan)[index])
    return index + (tie & (index % 2 == 1))


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """The e2m1 code of finite x: to nearest even, saturating, sign kept."""
    return (nearest(x, E2M1[:8]) + 8 * np.signbit(x)).astype(np.uint8)


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """The e4m3fn byte of x that is not NaN: to nearest even, saturating at 448, sign kept."""
    return (nearest(x, e4m3(np.arange(127))) + 128 * np.signbit(x)).astype(np.uint8)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Codes of packed bytes, the low nibble first: [..., C/2] -> [..., C]."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    return out


def dequantize(codes: np.ndarray, scales: np.ndarray, global_scale: float = 1.0) -> np.ndarray:
    """Float64 values of codes [..., C] (0..15) under scale values [..., C/G] (already decoded)."""
    group = codes.shape[-1] // scales.shape[-1]
    return E2M1[codes] * np.repeat(scales, group, axis=-1) * global_scale


def bmm(x: np.ndarray, w: np.ndarray, contract: str) -> np.ndarray:
    """Per-head product of x [B, H, K] with w [H, N, C], over the columns (v_up) or the rows (k_up)."""
    spec = {"columns": "bhc,hnc->bhn", "rows": "bhn,hnc->bhc"}[contract]
    return np.einsum(spec, x.astype(np.float64), w.astype(np.float64), optimize=True)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """g * x / sqrt(mean(x^2) + eps)."""
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def yarn_inv_freq(dim: int, theta: float, factor: float, original: float, fast: float, slow: float) -> np.ndarray:
    """YaRN's blended inverse frequencies (arXiv 2309.00071, section 3.2) with DeepSeek's ramp."""

    def correction(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(correction(fast)), 0), min(math.ceil(correction(slow)), dim - 1)
    if low == high:
        high += 0.001
    out = []
    for j in range(dim // 2):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        base = theta ** (-2 * j / dim)
        out.append(base / factor * ramp + base * (1 - ramp))
    return np.array(out)


def rotate(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotate pairs of x [..., R] by angles [..., R/2] as complex numbers; written back as two halves."""
    half = x.shape[-1] // 2
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; -inf scores get exactly 0."""
    shifted = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def attention(
    q: np.ndarray,
    latent: np.ndarray,
    k_rope: np.ndarray,
    kv_b: np.ndarray,
    nope: int,
    scale: float,
    first: int = 0,
) -> np.ndarray:
    """Naive causal MLA for one sequence.

    q [T, H, P+R] (rope part rotated), latent [S, L], k_rope [S, R], kv_b [H, P+V, L] -> [T, H, V]; query t
    sees keys 0 .. first + t.
    """
    k_nope = np.einsum("sl,hpl->shp", latent, kv_b[:, :nope])
    value = np.einsum("sl,hvl->shv", latent, kv_b[:, nope:])
    scores = np.einsum("thp,shp->hts", q[..., :nope], k_nope) + np.einsum("thr,sr->hts", q[..., nope:], k_rope)
    scores *= scale
    t, s = scores.shape[1:]
    visible = np.arange(s)[None] <= first + np.arange(t)[:, None]
    probs = softmax(np.where(visible[None], scores, -np.inf))
    return np.einsum("hts,shv->thv", probs, value)


def layer(
    x: np.ndarray,
    w: dict[str, np.ndarray],
    *,
    nope: int,
    rope: int,
    inv_freq: np.ndarray,
    scale: float,
    interleaved: bool = True,
    eps: float = 1e-6,
    positions: np.ndarray | None = None,
    cos_sin_scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One whole MLA layer for one sequence, naive, float64.

    x [T, E]; w by Hugging Face's names, linears [out, in], kv_b_proj [H, P+V, L]; returns y [T, E], the normed
    latents [T, L] and the rotated rope keys [T, R].
    """
    heads, _, rank = w["kv_b_proj"].shape
    positions = np.arange(len(x)) if positions is None else positions
    angles = positions[:, None] * inv_freq
    if "q_proj" in w:
        q = x @ w["q_proj"].T
    else:
        low = x @ w["q_a_proj"].T + w.get("q_a_proj_bias", 0.0)
        q = rms_norm(low, w["q_a_layernorm"], eps) @ w["q_b_proj"].T
    q = q.reshape(len(x), heads, nope + rope)
    q_rope = rotate(q[..., nope:], angles[:, None], interleaved) * cos_sin_scale
    q = np.concatenate([q[..., :nope], q_rope], -1)
    kv = x @ w["kv_a_proj_with_mqa"].T + w.get("kv_a_proj_bias", 0.0)
    latent = rms_norm(kv[:, :rank], w["kv_a_layernorm"], eps)
    k_rope = rotate(kv[:, rank:], angles, interleaved) * cos_sin_scale
    out = attention(q, latent, k_rope, w["kv_b_proj"], nope, scale)
    return out.reshape(len(x), -1) @ w["o_proj"].T + w.get("o_proj_bias", 0.0), latent, k_rope
