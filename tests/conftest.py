"""What holds for every test: fits are cached in the test run's folder, and Triton's own library can be interpreted."""

import importlib.util
import os

import pytest

# Triton decides between compiler and interpreter where a function is decorated, for its own library when it is first
# imported. Somebody (torch, transformers) may do that long before a test of our kernels runs; these are interpreted
# where a fixture says so.
if importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """The cache folder of this test run; the user's is left alone."""
    folder = tmp_path_factory.mktemp("cache") / "logitstore"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITSTORE_CACHE", str(folder))
        yield folder
