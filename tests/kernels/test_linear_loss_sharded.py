"""A head sharded over two processes by FSDP2: the loss and its gradients are those of the whole head."""

from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_fsdp2_from_inside_and_outside_of_the_heads_module(two_processes, tmp_path):
    two_processes(Path(__file__).parent / "sharded_head_worker.py", tmp_path / "meeting")
