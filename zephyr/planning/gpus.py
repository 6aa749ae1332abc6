"""What GPUs can do: the one table of their figures, per GPU, as they are in a server of eight."""

from typing import NamedTuple

from zephyr.errors import UserError
from zephyr.settings import nearest


class GPU(NamedTuple):
    """A kind of GPU. Rates of links are of one direction; "a GPU" means its share of the server's."""

    peak: float  # TFLOP/s of dense bf16 products, by the data sheet; what a utilisation is a share of
    product: float  # TFLOP/s of bf16 that large matrix products reach, measured
    single: float  # TFLOP/s of fp32 without tensor cores, by the data sheet
    memory: float  # GiB that the driver shows
    bandwidth: float  # GB/s of its memory, by the data sheet
    link: float  # GB/s to the other GPUs of the server: NVLink, or else PCIe
    network: float  # GB/s a GPU to other servers: one network card each, as in DGX and HGX servers
    host: float  # GB/s to the host's memory: PCIe


# peak, single, memory, bandwidth, links: NVIDIA's data sheets; memory: nvidia-smi.
# product: H200 measured with random numbers, 8192 cubed (788); H100 SXM and A100 are the best shapes of S. Bekman's
# table "Maximum Achievable Matmul FLOPS" (ml-engineering, compute/accelerator, torch 2.6 and 2.7: 794.5 and 271.2). Of
# the others no measurement is at hand: the 80 % of the peak that H100 reaches.
# The first name contained in a device's name counts.
GPUS = {
    "A100": GPU(312, 271, 19.5, 80.0, 2039, 300, 25, 32),
    "H100 PCIe": GPU(756, 605, 51, 79.6, 2000, 64, 50, 64),
    "H100 NVL": GPU(835, 668, 60, 93.6, 3900, 300, 50, 64),
    "H100": GPU(989, 790, 67, 79.6, 3350, 450, 50, 64),
    "H200": GPU(989, 790, 67, 140.4, 4800, 450, 50, 64),
    "L40S": GPU(362, 290, 91.6, 45.0, 864, 32, 25, 32),
    "RTX 4090": GPU(165, 132, 82.6, 24.0, 1008, 32, 12.5, 32),
}


def chosen(name: str) -> GPU:
    """The figures of a GPU by its name in this table. Raises UserError where it is not in it."""
    if name not in GPUS:
        raise UserError(f"gpu={name!r} is not known.{nearest(name, GPUS)} Choose one of: {', '.join(GPUS)}.")
    return GPUS[name]


def named(device: str) -> GPU | None:
    """The figures of a device by the name that its driver gives, None where unknown."""
    return next((gpu for part, gpu in GPUS.items() if part in device), None)
