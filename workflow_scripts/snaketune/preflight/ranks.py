"""Checks that need all ranks: the shared file system, and all-reduce with its bandwidth."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta

from snaketune.preflight.check import Check

SUM_BYTES = 64 << 20
_REPEATS = 5


def check_all_reduce(patience: float = 90) -> Check:
    """Sums 64 MiB of fp32 over the ranks five times, with NCCL on GPUs or gloo on CPUs; times the fastest.

    The bandwidth counts the bytes that each rank sends and receives, 2 (n - 1) / n of the total, as in
    NVIDIA's nccl-tests.

    Args:
        patience: Seconds to wait for the other ranks.
    """
    import torch
    from torch import distributed

    from snaketune.models.device import training_device

    device, ranks = training_device(), int(os.environ["WORLD_SIZE"])
    if ranks == 1:
        return Check("all-reduce", True, "skipped: one rank")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "nccl" if device == "cuda" else "gloo"
    signal.alarm(
        int(4 * patience)
    )  # ends this process: an unrelated program at that address could block it forever
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=patience))
        values = torch.empty(SUM_BYTES // 4, device=device)
        fastest = float("inf")
        for _ in range(_REPEATS):
            values.fill_(distributed.get_rank() + 1)
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(values)
            if device == "cuda":
                torch.cuda.synchronize()
            fastest = min(fastest, time.perf_counter() - started)
        right = bool((values == ranks * (ranks + 1) / 2).all())
        distributed.destroy_process_group()
        signal.alarm(0)
    except (RuntimeError, ValueError) as error:
        signal.alarm(0)
        interface = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        return Check(
            "all-reduce",
            False,
            f"{backend}: {str(error).splitlines()[0]}",
            f"open {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} between the nodes, and set {interface} to their "
            f"network device; if the port is in use, set MASTER_PORT",
        )
    if not right:
        return Check(
            "all-reduce", False, f"{backend}: wrong sum", "try NCCL_P2P_DISABLE=1; have the node checked"
        )
    bandwidth = SUM_BYTES * 2 * (ranks - 1) / ranks / fastest / 1e9
    return Check(
        "all-reduce",
        True,
        f"{backend}, {ranks} ranks: 64 MiB in {1000 * fastest:.1f} ms, {bandwidth:.2f} GB/s",
    )


def check_shared_files(nonce: dict, answers: Sequence[dict]) -> Check:
    """Checks, on the host that wrote the nonce, that every rank has read it.

    The answers prove that this host also reads files of the ranks.

    Args:
        nonce: `nonce` and `host`, as written.
        answers: One per rank: `nonce` (as read), `host`, `rank`, `world_size`, `folder`.
    """
    fix = "put results_dir on a file system that this host and all nodes mount at the same path"
    if not answers:
        return Check("shared files", False, f"no rank's answer arrived on {nonce['host']}", fix)
    expected = max(answer["world_size"] for answer in answers)
    missing = sorted(set(range(expected)) - {answer["rank"] for answer in answers})
    if missing:
        found = f"no answer from rank {', '.join(map(str, missing))} of {expected}"
        return Check("shared files", False, found, f"{fix}; see also the job's log")
    others = [answer for answer in answers if answer["nonce"] != nonce["nonce"]]
    if others:
        seen = ", ".join(f"rank {answer['rank']} on {answer['host']}" for answer in others)
        return Check(
            "shared files", False, f"{others[0]['folder']} differs from that on {nonce['host']}: {seen}", fix
        )
    hosts = ", ".join(sorted({answer["host"] for answer in answers}))
    return Check(
        "shared files", True, f"{expected} ranks on {hosts} and {nonce['host']} read each other's files"
    )
