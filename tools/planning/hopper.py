"""GPUs that are absent: what XLA's compiler would ask a Hopper card for, and what its links carry."""

import jax
import numpy as np
from jax.experimental import topologies

from tools.planning.chips import Chip

# Of the H100 SXM, H200 SXM and H800 alike, as CUDA reports them; memory is put in. The syntax is that of
# GpuTargetConfigProto in XLA (https://github.com/openxla/xla, xla/stream_executor/device_description.proto).
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def devices(chip: Chip, count: int) -> list:
    """Devices to compile for, so many to a host as a domain has; fewer are on one.

    Raises:
        ValueError: if hosts would not be full.
    """
    on_host = min(count, chip.domain)
    if count % on_host:
        raise ValueError(
            f"{count} devices of {chip.kind} do not fill hosts of {on_host}: choose a multiple of {on_host}."
        )
    target = _TARGET.format(bandwidth=chip.memory_bandwidth, memory=chip.memory_bytes, name=chip.kind.upper())
    name = f"{chip.kind}_{count}"  # JAX keeps topologies by name
    shape = f"1x{count // on_host}x{on_host}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=shape, target_config=target
    ).devices


def links(grid: jax.sharding.Mesh, chip: Chip) -> dict[str, float]:
    """Bytes a second that each GPU can send to all others along an axis of a mesh at the same time.

    Those of its host are reached over NVLink and the others, at the same time, over its network card: an
    exchange lasts as long as the slower part of it. An axis has one rate, so that of the two exchanges of
    `config.dispatch.hosts` the one inside a host is reckoned as if it crossed hosts too.
    """
    hosts = np.array([device.process_index for device in grid.devices.flat]).reshape(grid.devices.shape)
    rates = {}
    for number, axis in enumerate(grid.axis_names):
        group = np.moveaxis(hosts, number, 0).reshape(grid.shape[axis], -1)
        others = max(1, len(group) - 1)
        near = np.sum(group == group[:1], axis=0).min() - 1
        shares = (near / others / chip.fast_link, (len(group) - 1 - near) / others / chip.slow_link)
        rates[axis] = 1 / max(*shares, 1 / chip.fast_link / others)
    return rates
