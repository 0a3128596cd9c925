"""The torch reference of `lenvm_kernels.paged_attention`: same signature, any device and floating dtype.

One query a request (decode) runs as one padded batch; more (extend) run request by request, `MAX_QUERIES` at a time.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

MAX_QUERIES = 512  # bounds the score matrix


def paged_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """See `lenvm_kernels.paged_attention.paged_attention`."""
    out = q.new_empty(q.shape[0], q.shape[1], v_buffer.shape[2])
    num_queries = q_starts.diff()  # [B]
    decodes = num_queries == 1
    pieces = [decodes.nonzero().flatten()] if bool(decodes.any()) else []
    pieces += [row.reshape(1) for row in (num_queries > 1).nonzero().flatten()]
    for reqs in pieces:
        lens = kv_lens[reqs]  # [b]
        keys = torch.arange(int(lens.max()), device=q.device)  # [L]
        slots = req_to_token[req_pool_indices[reqs]][:, : keys.numel()]
        slots = slots.where(keys < lens[:, None], 0).long()  # [b, L]
        k, v = k_buffer[slots], v_buffer[slots]  # [b, L, Hkv, D]
        for first in range(0, int(num_queries[reqs[0]]), MAX_QUERIES):
            offsets = torch.arange(first, min(first + MAX_QUERIES, int(num_queries[reqs[0]])), device=q.device)
            tokens = q_starts[reqs][:, None] + offsets  # [b, Q]
            positions = (lens - num_queries[reqs])[:, None] + offsets  # [b, Q]
            seen = keys < lens[:, None, None]
            if causal:
                seen = seen & (keys <= positions[..., None])
            if window is not None:
                seen = seen & (keys >= positions[..., None] - window)
            out[tokens] = attend(q[tokens], k, v, seen.expand(-1, offsets.numel(), -1), scale, logit_cap)
    return out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, logit_cap: float
) -> torch.Tensor:
    """Dense attention with fp32 sums.

    q: [b, Q, H, D]; k, v: [b, L, Hkv, D]; seen: [b, Q, L] bool. Returns [b, Q, H, Dv]; rows seeing nothing are 0.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [b, heads, tokens, D]
    seen = seen[:, None]  # [b, 1, Q, L]
    if logit_cap == 0:
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    else:
        group = q.shape[1] // k.shape[1]
        scores = q.float() @ k.float().repeat_interleave(group, 1).transpose(2, 3) * scale
        scores = (logit_cap * torch.tanh(scores / logit_cap)).masked_fill(~seen, float("-inf"))
        out = (scores.softmax(-1) @ v.float().repeat_interleave(group, 1)).to(q.dtype)
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0).transpose(1, 2)
