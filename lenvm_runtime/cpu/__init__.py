"""The CPU platform: what stock SGLang needs to run on a machine without an accelerator."""
