"""What holds for every test: fitted tables are kept in a folder of the test run, never in the user's cache."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """The cache folder of this test run."""
    folder = tmp_path_factory.mktemp("cache") / "logitstore"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITSTORE_CACHE", str(folder))
        yield folder
