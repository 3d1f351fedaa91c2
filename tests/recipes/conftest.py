from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from recipes.builtin.library import Library

pytest.importorskip("resvg_py", reason="the recipe draws its data with it: pip install -e '.[recipes]'")


@pytest.fixture(scope="session")
def library() -> Library:
    from tests.recipes.tiny_library import tiny_library

    return tiny_library()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
