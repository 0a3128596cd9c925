"""LenVM inside the SGLang processes: plugin, sampler, value heads, CPU platform, launcher."""
