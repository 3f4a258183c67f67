"""Data of GPUs and networks, from the vendors' data sheets; the source of each entry is its last field.

Peaks are dense (NVIDIA's data sheets give twice as much, with sparsity). Bandwidths of links are for one direction, which is
half of what NVIDIA gives for both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPUEntry:
    """One GPU as torch sees it, and the node that it is usually in."""

    name: str
    bf16_tflops: float
    """Dense peak of bf16 and fp16 matrix products with fp32 sums, in TFLOP/s."""
    fp8_tflops: float | None
    """Dense peak of fp8 matrix products in TFLOP/s; None if there are none."""
    fp32_tflops: float
    """Peak of fp32 products in TFLOP/s, without TF32."""
    memory_gib: float
    """Device memory in GiB, as it is sold."""
    memory_bandwidth: float
    """Bandwidth of the device memory in GB/s."""
    link: float
    """Bandwidth of a GPU to the others of its node (NVLink, xGMI) in GB/s, one direction, as a ring over the node gets it."""
    gpus_per_node: int
    """GPUs that these links join."""
    network: float
    """Bandwidth of one node to the others in GB/s, one direction, all network cards together."""
    source: str
    products_share: float | None = None
    """Share of the peak that matrix products reach in training; the planner's own if None, as for the next three."""
    memory_share: float | None = None
    """Share of the memory bandwidth that other kernels reach."""
    link_share: float | None = None
    """Share of the bandwidth within a node that collectives reach."""
    network_share: float | None = None
    """Share of the bandwidth between nodes that collectives reach."""


GPUS: dict[str, GPUEntry] = {
    entry.name: entry
    for entry in (
        GPUEntry("A100-40GB", 312, None, 19.5, 40, 1555, 300, 8, 200, "NVIDIA A100 data sheet (SXM); DGX A100: 8 x 200 Gb/s"),
        GPUEntry("A100-80GB", 312, None, 19.5, 80, 2039, 300, 8, 200, "NVIDIA A100 data sheet (SXM); DGX A100: 8 x 200 Gb/s"),
        GPUEntry("H100", 989.4, 1978.9, 66.9, 80, 3352, 450, 8, 400, "NVIDIA H100 data sheet (SXM); DGX H100: 8 x 400 Gb/s"),
        GPUEntry("H200", 989.4, 1978.9, 66.9, 141, 4800, 450, 8, 400, "NVIDIA H200 data sheet; DGX H200: 8 x 400 Gb/s"),
        GPUEntry("B200", 2250, 4500, 75, 180, 8000, 900, 8, 400, "NVIDIA DGX B200 data sheet, an eighth of it; 8 x 400 Gb/s"),
        GPUEntry("GB200", 2500, 5000, 80, 186, 8000, 900, 72, 3600, "NVIDIA GB200 NVL72 data sheet, 1/72 of it; 72 x 400 Gb/s"),
        GPUEntry(
            "MI250X",
            191.5,
            None,
            23.9,
            64,
            1638,
            50,
            8,
            100,
            "AMD MI250X data sheet, one of two dies; a ring over the dies of a node passes links of 50 GB/s; "
            "HPE Cray EX235a: 4 x 200 Gb/s",
        ),
        GPUEntry(
            "MI300X", 1307.4, 2614.9, 163.4, 192, 5300, 448, 8, 400, "AMD MI300X data sheet, 7 links of 64 GB/s; 8 x 400 Gb/s"
        ),
    )
}
"""By name."""

DEVICE_NAMES = {
    "A100-SXM4-40GB": "A100-40GB",
    "A100-PCIE-40GB": "A100-40GB",
    "A100": "A100-80GB",
    "H100 80GB HBM3": "H100",
    "H200": "H200",
    "GB200": "GB200",
    "B200": "B200",
    "MI250X": "MI250X",
    "MI300X": "MI300X",
}
"""Part of the name that a driver reports -> GPU; the first match counts."""

NETWORKS: dict[str, float] = {
    "25GbE": 3.125,
    "100GbE": 12.5,
    "4x100G": 50,
    "8x100G": 100,
    "8x200G": 200,
    "8x400G": 400,
    "8x800G": 800,
}
"""Usual networks: GB/s of one node, one direction. 4x100G: AWS p4d; 8x200G: InfiniBand HDR; 8x400G: InfiniBand NDR, AWS p5."""
