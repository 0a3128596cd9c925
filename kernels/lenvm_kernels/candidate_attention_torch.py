"""The torch reference of `lenvm_kernels.candidate_attention`: same signature, any device and floating dtype."""

from __future__ import annotations

from itertools import pairwise

import torch


def candidate_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """See `lenvm_kernels.candidate_attention.candidate_attention`. Request by request: reads lengths on the host."""
    out = q.new_zeros(q.shape[0], q.shape[1], v_buffer.shape[2])
    requests = zip(req_pool_indices.tolist(), kv_lens.tolist(), pairwise(q_starts.tolist()), strict=True)
    for pool_index, kv_len, (first, last) in requests:
        if first == last:
            continue
        slots = req_to_token[pool_index, :kv_len].long()  # [L]
        rows = slice(first, last)
        seen = _seen_keys(last - first, kv_len, window, q.device)
        out[rows] = _attend(
            q[rows].float(),
            k_new[rows].float(),
            v_new[rows].float(),
            k_buffer[slots].float(),
            v_buffer[slots].float(),
            seen,
            scale,
            logit_cap,
        ).to(q.dtype)
    return out


def _seen_keys(num_rows: int, kv_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys each row of a request sees: [n, L + 1] bool, the cached ones and its own new one last."""
    is_candidate = torch.arange(num_rows, device=device) > 0  # [n]
    position = kv_len - 1 + is_candidate.long()
    key = torch.arange(kv_len, device=device)
    first_key = position - kv_len if window is None else position - window  # [n]
    return torch.cat([key >= first_key[:, None], is_candidate[:, None]], dim=1)


def _attend(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    logit_cap: float,
) -> torch.Tensor:
    """Rows of one request, in fp32: q [n, Hq, D]; k_new, v_new [n, Hkv, D]; k, v [L, Hkv, D]; seen [n, L + 1]."""
    q = q.unflatten(1, (k.shape[1], -1))  # [n, Hkv, G, D]
    cached_scores = torch.einsum("nhgd,lhd->nhgl", q, k)
    own_scores = torch.einsum("nhgd,nhd->nhg", q, k_new).unsqueeze(-1)
    scores = scale * torch.cat([cached_scores, own_scores], dim=-1)  # [n, Hkv, G, L + 1]
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1)[:, None, None, None], 0.0)
    cached = torch.einsum("nhgl,lhd->nhgd", weights[..., :-1], v)
    own = (weights[..., -1:] * v_new.unsqueeze(2)).masked_fill(~seen[:, -1, None, None, None], 0.0)
    return (cached + own).flatten(1, 2)
