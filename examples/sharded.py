# SPDX-License-Identifier: Apache-2.0
"""Splits an MLP over two processes of this machine, and shows that columns give the bits of one process.

.venv/bin/python examples/sharded.py   # or: torchrun --nproc-per-node 2 examples/sharded.py
"""

import os
import socket

import torch
import torch.distributed as dist
import xpu_fp4
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.multiprocessing.spawn import start_processes
from xpu_fp4.distributed import ColumnParallel, RowParallel

RANKS = 2


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.up(x)))
        return y


@torch.inference_mode()
def run() -> None:
    """Runs in every rank. Each makes the same model, and keeps its share of the weights."""
    torch.manual_seed(0)
    mlp, x = xpu_fp4.quantize_(MLP(), mode="w4a8"), torch.randn(4, 256)
    up, y = mlp.up(x), mlp(x)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(mlp, mesh, {"up": ColumnParallel(), "down": RowParallel()})
    shard = up.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]
    same, error = torch.equal(mlp.up(x), shard), (mlp(x) - y).abs().max()
    bits = "the same bits" if same else "OTHER BITS"
    # One write per line: print's own newline is a second one where Python does not buffer, and another rank may come between.
    print(f"rank {dist.get_rank()}: columns have {bits}; rows differ by at most {error:.1e}\n", end="")
    dist.destroy_process_group()
    if not same:
        raise SystemExit(1)


def _process(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started us
        dist.init_process_group("gloo")
        run()
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Forked processes need not import torch again; that is safe here, since no op has started threads yet.
        start_processes(_process, (port,), nprocs=RANKS, start_method="fork")
