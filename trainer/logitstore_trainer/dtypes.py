"""The names of the dtypes that a model runs in: one spelling, torch's, and the short ones that people type."""

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def long_name(dtype: str) -> str:
    """ "bfloat16" for "bf16", and so on; any other name as it is."""
    return _SHORT.get(dtype, dtype)
