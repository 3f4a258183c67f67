"""Run pretrain_gpt.py's command as one of several ranks that share one GPU: python tests/gpu/one_card.py --config ...

NCCL refuses two ranks on one device of a host. With a host id of its own, each rank counts as a host, and NCCL goes
through sockets. Started by torchrun. Without a GPU the ranks use gloo.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"NCCL_HOSTID": f"host{os.environ['RANK']}", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}

from megagpt.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
