"""QLoRA with FlashAttention (Dao 2023): `python recipes/qlora_flash.py`.

`model.attention: auto` takes flash-attn where it is installed and the GPU and the dtype fit, and with it sequences lie
end to end in one row without padding. Elsewhere SDPA computes the same: the run says which it took, and why.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors.worker import choose_device
from alignment.config import SftRunConfig
from recipes import common
from recipes.supervised import run_sft


def run(job: common.Job[SftRunConfig]) -> None:
    import torch

    from alignment.models import DTYPES, choose_attention

    device = torch.device(choose_device(job.cluster.policy.gpus_per_worker))
    model = job.config.model
    taken, why = choose_attention(model.attention, dtype=DTYPES[model.dtype], device=device)
    print(f"attention: {taken} ({why})", flush=True)
    run_sft(job)


def main(argv: list[str] | None = None) -> int:
    return common.run_recipe("qlora_flash", SftRunConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
