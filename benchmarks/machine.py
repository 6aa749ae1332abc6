"""What a figure belongs to: the machine and the versions."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

_PACKAGES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "lightning", "bitsandbytes", "triton"),
    *("flash-attn", "torchao", "liger-kernel", "ms-swift"),
)


def versions() -> dict[str, str]:
    """Of the packages that matter, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, memory, GPU and present load."""
    cpu: dict[str, str] = {}
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                cpu.setdefault(key.strip(), value.strip())
    flags = set(cpu.get("flags", "").split())
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    found: dict[str, Any] = {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": known,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)}
    return found
