"""The loss where each of two processes has some columns of the logits, against the reference of all columns."""

from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_with_uneven_shards(two_processes, tmp_path):
    two_processes(Path(__file__).parent / "vocab_parallel_worker.py", tmp_path / "meeting")
