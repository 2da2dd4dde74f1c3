"""Models and inputs in PyTorch, where it is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def read(directory: Path, **options: Any) -> Any:
    """The model of a Hugging Face directory, with the code that lies there."""
    from transformers import AutoModelForImageTextToText

    options = {"trust_remote_code": True} | options
    return AutoModelForImageTextToText.from_pretrained(directory, **options).eval()


def tensors(arrays: Mapping[str, np.ndarray], config: Any) -> dict[str, Any]:
    """What the processor gives."""
    import torch

    given = {
        name: torch.from_numpy(np.array(array, np.float32 if "pixel" in name else np.int64))
        for name, array in arrays.items()
    }
    ids = given["input_ids"]
    images, videos = ids == config.image_token_id, ids == config.video_token_id
    return given | {"mm_token_type_ids": images.long() + 2 * videos.long()}
