"""Batched numeric ops of LenVM: a readable torch reference and a Triton kernel behind one contract."""
