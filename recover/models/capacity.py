"""Estimate how many prompts fit into half of the free memory, from the sizes of the model and the SAE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch

MOST_AT_ONCE = 64
"""The largest batch: beyond it nothing is gained, and an interrupted run would lose more."""
BYTES = 4
CGROUP = Path("/sys/fs/cgroup")


def prompts_at_once(config: Any, *, n_layers: int, d_model: int, d_sae: int, pos: int, device: torch.device) -> int:
    """Number of prompts, at least 1, for which the largest pass fits into half of the free memory.

    The largest pass is attribution, whose graph holds every position at every layer: about 14 times `d_model`, 6 times
    the feed-forward width and 3 attention maps per layer. Added to it are the logits of every position (for the loss)
    and three tensors of SAE features. `pos` is the number of tokens of the longest prompt; sizes that `config` does not
    give take common values.
    """
    needed = bytes_a_prompt(config, n_layers=n_layers, d_model=d_model, d_sae=d_sae, pos=pos)
    return max(1, min(MOST_AT_ONCE, int(free_memory(device) / 2 / needed)))


def bytes_a_prompt(config: Any, *, n_layers: int, d_model: int, d_sae: int, pos: int) -> int:
    """Estimate the bytes that the largest pass holds per prompt; arguments as in `prompts_at_once`."""
    heads = getattr(config, "num_attention_heads", None) or 1
    wide = getattr(config, "intermediate_size", None) or 4 * d_model
    vocab = getattr(config, "vocab_size", None) or 0
    graph = n_layers * pos * (14 * d_model + 6 * wide + 3 * heads * pos)
    return int(BYTES * (max(graph, 2 * pos * vocab) + 3 * pos * d_sae))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may allocate on a device, divided by the workers that share the device."""
    workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, as torchrun says
    return _free(device) // (-(-workers // torch.cuda.device_count()) if device.type == "cuda" else workers)


def _free(device: torch.device) -> int:
    """Free bytes on a device, within the memory limit of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free
