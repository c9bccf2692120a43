"""Triton as the tests use it: its own library is made for the interpreter, our kernels are where a fixture says so."""

import importlib.util
import os

# Triton decides between compiler and interpreter where a function is decorated, for its own library when it is first
# imported. Somebody (torch, transformers) may do that long before a test of our kernels runs.
if importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
