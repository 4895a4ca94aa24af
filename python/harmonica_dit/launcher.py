"""What torchrun and `accelerate launch` tell the processes that they start, in the environment."""

import os


def started() -> int:
    """How many processes there are of this one's kind; 1 without a launcher."""
    told = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if told else 1
