from pathlib import Path

import pytest
from tiny import Files, variant


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A very small model's checkpoint pair and tokenizer."""
    folder = tmp_path / "files"
    folder.mkdir()
    return variant(folder)
