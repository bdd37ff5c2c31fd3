"""Does NCCL take the cap that the partition sets? Groups with it are made on one GPU and used.

python bench/nccl_cap.py
"""

import os
from typing import Any

import torch
import torch.distributed as dist

from counterflow.comm.partition import capped


def main() -> None:
    """Groups of one rank with several caps, each used once."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29671")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    for wanted in (0, 4, 8, 12, 20):
        options = capped(wanted, device)
        group = dist.new_group([0], pg_options=options)
        assert isinstance(group, dist.ProcessGroup), "its only rank is a member"
        one = torch.ones(1 << 20, device=device)
        dist.all_reduce(one, group=group)
        torch.cuda.synchronize()
        found: Any = group._get_backend(device).options
        print(f"{wanted} multiprocessors: max_ctas {found.config.max_ctas}, min_ctas {found.config.min_ctas}")
        if options is not None:
            assert found.config.max_ctas == options.config.max_ctas <= wanted
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
