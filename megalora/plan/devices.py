"""GPUs and networks by name: what each can do at most, by its maker.

FLOP/s are dense, of bf16 on tensor cores: data sheets that give them with sparsity say twice as
much. Links are counted one way: NVLink's totals are of both. Memory is what the driver shows.

    a100   NVIDIA A100 Tensor Core GPU data sheet (2021), A100 80GB SXM
    h100   NVIDIA H100 Tensor Core GPU data sheet, H100 SXM
    h200   NVIDIA H200 Tensor Core GPU data sheet, H200 SXM
    b200   NVIDIA HGX B200 of 8 GPUs, NVIDIA Blackwell architecture technical brief
    gb200  NVIDIA GB200 NVL72 data sheet, of its 72 GPUs, all on one NVLink
    l40s   NVIDIA L40S data sheet; PCIe Gen4 x16 in place of NVLink

    ndr, hdr, xdr  InfiniBand of 400, 200 and 800 Gbit/s, an adapter (ConnectX-7, 6 and 8) per GPU
    roce100        Ethernet of 100 Gbit/s per GPU
    efa-p4         Amazon EC2 p4d.24xlarge and p4de, 400 Gbit/s for 8 GPUs
    efa-p5         Amazon EC2 p5.48xlarge, 3,200 Gbit/s for 8 GPUs
"""

from collections.abc import Mapping
from dataclasses import dataclass

_GBIT = 10**9 / 8
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one GPU can do at most.

    memory: bytes. flops: FLOP/s in bf16, dense. memory_bandwidth: bytes/s. link_bandwidth: bytes/s
    that it sends to GPUs of its node. gpus_per_node: how many such links connect.
    """

    name: str
    memory: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What connects nodes. bandwidth: bytes/s that each GPU sends to other nodes at most."""

    name: str
    bandwidth: float


def _device(
    name: str, memory: int, flops: float, hbm: float, link: float, **more: int
) -> tuple[str, Device]:
    short = name.split()[0].lower()
    return short, Device(
        name=name,
        memory=memory * _MIB,
        flops=flops,
        memory_bandwidth=hbm,
        link_bandwidth=link,
        **more,
    )


DEVICES: Mapping[str, Device] = dict(
    (
        _device("A100 SXM 80GB", 81_920, 312e12, 2.039e12, 300e9),
        _device("H100 SXM 80GB", 81_559, 989.5e12, 3.35e12, 450e9),
        _device("H200 SXM 141GB", 143_771, 989.5e12, 4.8e12, 450e9),
        _device("B200 SXM 180GB", 183_359, 2_250e12, 8e12, 900e9),
        _device("GB200 NVL72 186GB", 189_471, 2_500e12, 8e12, 900e9, gpus_per_node=72),
        _device("L40S 48GB", 46_068, 362e12, 0.864e12, 32e9),
    )
)
NETWORKS: Mapping[str, Network] = {
    name: Network(name=long, bandwidth=gigabits * _GBIT)
    for name, long, gigabits in (
        ("ndr", "InfiniBand NDR", 400),
        ("hdr", "InfiniBand HDR", 200),
        ("xdr", "InfiniBand XDR", 800),
        ("roce100", "RoCE", 100),
        ("efa-p4", "EFA of p4d", 50),
        ("efa-p5", "EFA of p5", 400),
    )
}


def device_named(name: str) -> Device:
    """Return a GPU by its name; ValueError where there is none."""
    return _named(name, DEVICES, "gpu")


def network_named(name: str) -> Network:
    """Return a network by its name; ValueError where there is none."""
    return _named(name, NETWORKS, "network")


def _named[T](name: str, table: Mapping[str, T], field: str) -> T:
    if name.lower() not in table:
        raise ValueError(f"{field} {name!r} is not known: use one of {', '.join(table)}")
    return table[name.lower()]
